//! The device as `vhost-user-backend` knows devices, so that it also runs under that crate's `VhostUserDaemon`.
//!
//! The stock daemon owns its rings and kicks; on the first event of a queue its state is read and the queue starts on
//! our own iothread, later events poke it, `stop_vring` drains it. Our own session calls the same methods for
//! features and configuration. What the stock daemon cannot do (see `docs/decisions`) is not done here.

use std::io::{Error, Result};
use std::sync::{Arc, PoisonError};

use ring::{Memory, RingAddresses};
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{VhostUserBackend, VringMutex, VringT};
use virtio_queue::QueueT;
use vm_memory::{GuestAddressSpace, GuestMemoryAtomic, GuestMemoryMmap};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::config::feature;
use super::device::{BlkDevice, Call, RingSetup};

/// A ring of the stock daemon that our worker serves.
pub struct StockRing {
    vring: VringMutex,
}

/// The device behind the stock trait, whose methods take `&self` where starting a queue takes the device's `Arc`.
#[derive(Clone, Debug)]
pub struct VhostDevice(pub Arc<BlkDevice>);

impl std::ops::Deref for VhostDevice {
    type Target = Arc<BlkDevice>;

    fn deref(&self) -> &Arc<BlkDevice> {
        &self.0
    }
}

impl BlkDevice {
    /// False: the ring is not to run.
    fn start_stock(self: &Arc<Self>, index: usize, vring: &VringMutex) -> Result<bool> {
        let memory = self.stock_memory.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let memory = memory.ok_or_else(|| Error::other("a queue event before any memory"))?;
        let setup = {
            let state = vring.get_ref();
            let queue = state.get_queue();
            if !queue.ready() {
                // The daemon collects events before it hands them out: this one is older than the ring's end.
                return Ok(false);
            }
            RingSetup {
                memory,
                size: queue.size(),
                addresses: RingAddresses {
                    descriptors: queue.desc_table(),
                    available: queue.avail_ring(),
                    used: queue.used_ring(),
                },
                base: queue.next_avail(),
                // The daemon refuses the messages.
                inflight: None,
                features: self.acked(),
                kick: None,
                // Through the daemon's wrapper, which follows SET_VRING_CALL: a driver gets its own descriptor only after
                // the ring runs.
                call: Some(Call::Stock(vring.clone())),
                err: None,
            }
        };
        self.start_queue(index, setup).map(|()| true).map_err(Error::other)
    }
}

impl VhostUserBackend for VhostDevice {
    type Bitmap = ();
    type Vring = VringMutex;

    fn num_queues(&self) -> usize {
        self.0.config().options().num_queues.into()
    }

    fn max_queue_size(&self) -> usize {
        self.0.config().options().queue_size.into()
    }

    fn features(&self) -> u64 {
        self.0.config().features()
    }

    fn acked_features(&self, features: u64) {
        self.0.set_acked(features);
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::DEVICE_STATE
    }

    fn reset_device(&self) {
        self.0.set_acked(0);
        self.0.config().reset_write_cache();
    }

    fn set_event_idx(&self, _enabled: bool) {
        // Known from the acknowledged features when a queue starts.
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        self.0.config().read(offset, size)
    }

    fn set_config(&self, offset: u32, bytes: &[u8]) -> Result<()> {
        if self.0.acked() & feature::CONFIG_WCE == 0 && self.0.acked() != 0 {
            return Err(Error::other("the driver did not negotiate VIRTIO_BLK_F_CONFIG_WCE"));
        }
        self.0.config().write(offset, bytes).map_err(Error::other)
    }

    fn update_memory(&self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> Result<()> {
        let memory = Arc::new(Memory::from_vm_memory(&memory.memory()).map_err(Error::other)?);
        *self.0.stock_memory.lock().unwrap_or_else(PoisonError::into_inner) = Some(memory.clone());
        let running: Vec<usize> =
            self.0.stock.lock().unwrap_or_else(PoisonError::into_inner).keys().copied().collect();
        self.0.set_memory(&running, memory);
        Ok(())
    }

    fn queues_per_thread(&self) -> Vec<u64> {
        // One waiting thread for all queues: it only passes events on. The indexes it reports are then queue numbers.
        let n = self.num_queues().min(64);
        vec![if n == 64 { u64::MAX } else { (1 << n) - 1 }]
    }

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        // Without one the daemon waits for its thread for ever when it is dropped.
        match new_event_consumer_and_notifier(EventFlag::NONBLOCK | EventFlag::CLOEXEC) {
            Ok(pair) => Some(pair),
            Err(e) => {
                log::error!("export '{}': no descriptor to end its thread by: {e}", self.0.name());
                None
            }
        }
    }

    fn stop_vring(&self, index: u32) -> Result<()> {
        let index = index as usize;
        let ring = self.0.stock.lock().unwrap_or_else(PoisonError::into_inner).remove(&index);
        if let Some(ring) = ring
            && let Some(base) = self.0.stop_queue(index, true)
        {
            ring.vring.set_queue_next_avail(base);
        }
        Ok(())
    }

    fn handle_event(&self, event: u16, _set: EventSet, vrings: &[VringMutex], _thread: usize) -> Result<()> {
        let index = usize::from(event);
        let Some(vring) = vrings.get(index) else { return Err(Error::other("an event of no queue")) };
        let mut rings = self.0.stock.lock().unwrap_or_else(PoisonError::into_inner);
        if rings.contains_key(&index) {
            drop(rings);
            self.0.poke(index);
            return Ok(());
        }
        match self.0.start_stock(index, vring) {
            Ok(true) => {
                rings.insert(index, StockRing { vring: vring.clone() });
            }
            Ok(false) => {}
            // An error would end the daemon's thread, and with it all queues.
            Err(e) => log::error!("export '{}': queue {index} cannot start: {e}", self.0.name()),
        }
        Ok(())
    }
}

#[cfg(test)]
#[path = "stock_tests.rs"]
mod tests;
