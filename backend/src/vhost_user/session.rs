//! What a front end has said so far, and what follows from it for the device's queues.
//!
//! Driven by `connection` through the `vhost` crate, one message at a time. Each handler checks its arguments before
//! anything changes; what reaches a ring is a message to the ring's iothread, acknowledged before the handler
//! returns. A refused message ends the connection (with a negative acknowledgement first, where one was asked for).
//! Message names and rules: "Vhost-user Protocol", section "Front-end message types".

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use ring::{InflightRegion, Kick, Memory, Notifier, Region, RingAddresses};
use vhost::vhost_user::message::*;
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use vhost_user_backend::VhostUserBackend as _;

use crate::blk::config::feature;
use crate::blk::device::{BlkDevice, Call, RingSetup};
use crate::blk::stock::VhostDevice;

/// Memory regions a front end may configure, with or without CONFIGURE_MEM_SLOTS: QSD's figure.
pub const MAX_MEM_SLOTS: u64 = 509;
/// Older cloud-hypervisor reads the configuration at this offset (the offset of the device area in virtio-mmio).
const OLD_CONFIG_OFFSET: u32 = 0x100;

/// One ring as the front end described it.
#[derive(Default)]
struct Vring {
    size: u16,
    base: u16,
    addresses: Option<RingAddresses>,
    kick: Option<Kick>,
    call: Option<Notifier>,
    err: Option<Notifier>,
    /// Said by SET_VRING_ENABLE; without PROTOCOL_FEATURES a ring is enabled as soon as it starts.
    enabled: bool,
    /// Whether the device serves the ring now.
    running: bool,
}

/// The state of one connection.
pub struct Session {
    device: VhostDevice,
    features: u64,
    protocol: VhostUserProtocolFeatures,
    memory: Option<Arc<Memory>>,
    /// Where rings that start from now on are tracked. The front end keeps the memory file when we are gone.
    inflight: Option<Arc<InflightRegion>>,
    vrings: Vec<Vring>,
}

impl Session {
    /// A fresh session: no features, no memory, all rings stopped.
    pub fn new(device: Arc<BlkDevice>) -> Self {
        // What changed while nobody was connected is no news to a front end that has yet to read the configuration.
        device.channel().clear();
        let device = VhostDevice(device);
        let vrings = std::iter::repeat_with(Vring::default).take(device.num_queues()).collect();
        let protocol = VhostUserProtocolFeatures::empty();
        Session { device, features: 0, protocol, memory: None, inflight: None, vrings }
    }

    /// The connection ended: stop every ring (waits for what is in flight), let go of the guest's memory.
    pub fn close(&mut self) {
        // Stopping waits for the iothreads, which may wait for a descriptor that this front end made blocking and filled.
        self.vrings.iter().flat_map(|v| [&v.call, &v.err]).flatten().for_each(Notifier::make_room);
        self.stop_all(false);
        self.device.channel().clear();
        self.vrings.clear();
        self.memory = None;
        self.inflight = None;
        self.device.reset_device();
    }

    /// What the device offers under any daemon, and what this session adds to it.
    fn offered(&self) -> VhostUserProtocolFeatures {
        self.device.protocol_features() | VhostUserProtocolFeatures::INFLIGHT_SHMFD
    }

    /// An area may have no more rings than the device.
    fn check_inflight(&self, area: &VhostUserInflight) -> Result<()> {
        let count = self.vrings.len();
        if usize::from(area.num_queues) > count {
            return Err(self.refuse(format_args!(
                "in-flight area for {} queues: the device has {count}",
                area.num_queues
            )));
        }
        Ok(())
    }

    fn refuse(&self, text: impl std::fmt::Display) -> Error {
        log::warn!("export '{}': {text}", self.device.name());
        Error::ReqHandlerError(std::io::Error::other(text.to_string()))
    }

    fn vring(&mut self, index: u32) -> Result<&mut Vring> {
        let count = self.vrings.len();
        if index as usize >= count {
            return Err(self.refuse(format_args!("queue {index} does not exist: the device has {count}")));
        }
        self.vrings.get_mut(index as usize).ok_or(Error::InvalidParam)
    }

    fn stop_all(&mut self, told: bool) {
        for index in 0..self.vrings.len() {
            self.stop(index, told);
        }
    }

    /// Stops the ring if it runs; afterwards nothing of it is in flight and `base` says where to go on. `told`: the front
    /// end asked for it.
    fn stop(&mut self, index: usize, told: bool) {
        let Some(v) = self.vrings.get_mut(index) else { return };
        if !v.running {
            return;
        }
        v.running = false;
        if let Some(base) = self.device.stop_queue(index, told) {
            v.base = base;
        }
        self.device.channel().ring_stopped();
    }

    /// Starts the ring if everything it needs is there.
    fn start_if_ready(&mut self, index: usize) -> Result<()> {
        let protocol = self.features & feature::PROTOCOL != 0;
        let Some(v) = self.vrings.get(index) else { return Ok(()) };
        let (Some(addresses), Some(kick)) = (v.addresses, v.kick.as_ref()) else { return Ok(()) };
        if v.running || v.size == 0 || (protocol && !v.enabled) {
            return Ok(());
        }
        let Some(memory) = self.memory.clone() else {
            // Allowed, memory may still come. QEMU leaves out what is not shared and goes on without a word: this line
            // is all that tells why the guest waits.
            log::warn!(
                "export '{}': queue {index} waits: the front end has given no guest memory. {SHARE_HINT}",
                self.device.name()
            );
            return Ok(());
        };
        let inflight = match &self.inflight {
            // The number of queues is far below 65536.
            Some(area) => Some(area.tracker(index as u16, v.size).map_err(|e| self.refuse(e))?),
            None => None,
        };
        let setup = RingSetup {
            memory,
            size: v.size,
            addresses,
            base: v.base,
            inflight,
            features: self.features,
            kick: Some(dup_kick(kick)?),
            call: v.call.as_ref().map(dup).transpose()?.map(Call::Notifier),
            err: v.err.as_ref().map(dup).transpose()?,
        };
        match self.device.start_queue(index, setup) {
            Ok(()) => {
                if let Some(v) = self.vrings.get_mut(index) {
                    v.running = true;
                }
                self.device.channel().ring_started();
                Ok(())
            }
            Err(e) => Err(self.refuse(format_args!("queue {index} cannot start: {e}"))),
        }
    }

    /// A new memory table takes effect: running rings move to it, stopped ones that waited for memory start.
    fn set_memory(&mut self, memory: Arc<Memory>) -> Result<()> {
        if !memory.is_sealed_against_shrink() {
            log::debug!("export '{}': guest memory is not sealed against shrinking", self.device.name());
        }
        self.memory = Some(memory.clone());
        let running: Vec<usize> =
            self.vrings.iter().enumerate().filter(|(_, v)| v.running).map(|(i, _)| i).collect();
        self.device.set_memory(&running, memory);
        for index in 0..self.vrings.len() {
            self.start_if_ready(index)?;
        }
        Ok(())
    }

    fn fds(&self, what: &str, index: u8, fd: Option<File>) -> Result<Option<Notifier>> {
        fd.map(|f| Notifier::new(OwnedFd::from(f)))
            .transpose()
            .map_err(|e| self.refuse(format_args!("queue {index}: {what} descriptor: {e}")))
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Also after a panic: a ring must not be served for a front end that nobody listens to.
        self.close();
    }
}

fn dup(n: &Notifier) -> Result<Notifier> {
    let fd = n.as_fd().try_clone_to_owned().map_err(Error::ReqHandlerError)?;
    Notifier::new(fd).map_err(|e| Error::ReqHandlerError(std::io::Error::other(e)))
}

fn dup_kick(k: &Kick) -> Result<Kick> {
    let fd = k.as_fd().try_clone_to_owned().map_err(Error::ReqHandlerError)?;
    Kick::new(fd).map_err(|e| Error::ReqHandlerError(std::io::Error::other(e)))
}

fn region(r: &VhostUserMemoryRegion, fd: File) -> Region {
    // The struct is packed: copy the fields.
    Region {
        guest_addr: { r.guest_phys_addr },
        size: { r.memory_size },
        user_addr: { r.user_addr },
        mmap_offset: { r.mmap_offset },
        fd: OwnedFd::from(fd),
    }
}

/// Sharing is what front ends forget; said in the words of their options.
const SHARE_HINT: &str = "The guest's memory must be shared: QEMU wants `-object memory-backend-memfd,...,share=on` \
                          (and `-machine memory-backend=`), cloud-hypervisor `--memory shared=on` (`shared: true` in \
                          its API)";

fn memory_hint(e: &impl std::fmt::Display) -> String {
    format!("guest memory cannot be mapped: {e}. {SHARE_HINT}")
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        // Sent once per connection by the specification, again by some front ends after a reset: harmless.
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        // "No longer used": older front ends disable the device with it. Stop as RESET_DEVICE would.
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.stop_all(true);
        for v in &mut self.vrings {
            *v = Vring::default();
        }
        self.features = 0;
        // The rings start from nothing, and so does what is remembered of them: front ends send an area each time.
        self.inflight = None;
        self.device.reset_device();
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.device.features())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        let unknown = features & !self.device.features();
        if unknown != 0 {
            return Err(self.refuse(format_args!("features {unknown:#x} were not offered")));
        }
        if features & feature::VERSION_1 == 0 && self.vrings.iter().any(|v| v.running) {
            return Err(self.refuse("a legacy driver (no VIRTIO_F_VERSION_1) is not served"));
        }
        self.features = features;
        self.device.acked_features(features);
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<vhost::VhostUserMemoryRegionBase>>> {
        let table = regions.iter().zip(files).map(|(r, f)| region(r, f)).collect();
        let memory = Memory::map(table).map_err(|e| self.refuse(memory_hint(&e)))?;
        self.set_memory(Arc::new(memory)).map(|()| None)
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_MEM_SLOTS)
    }

    fn add_mem_region(
        &mut self,
        r: &VhostUserSingleMemoryRegion,
        fd: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<vhost::VhostUserMemoryRegionBase>> {
        let added = match &self.memory {
            Some(m) => m.with_added(region(r, fd)),
            None => Memory::map(vec![region(r, fd)]),
        };
        let memory = added.map_err(|e| self.refuse(memory_hint(&e)))?;
        self.set_memory(Arc::new(memory)).map(|()| None)
    }

    fn remove_mem_region(&mut self, r: &VhostUserSingleMemoryRegion) -> Result<()> {
        let (guest_addr, size, user_addr) = ({ r.guest_phys_addr }, { r.memory_size }, { r.user_addr });
        let Some(memory) = &self.memory else {
            return Err(self.refuse("REM_MEM_REG before any memory was added"));
        };
        let memory = memory
            .with_removed(guest_addr, user_addr, size)
            .map_err(|e| self.refuse(format_args!("memory region cannot be removed: {e}")))?;
        self.set_memory(Arc::new(memory))
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let max = u32::from(self.device.config().options().queue_size);
        if self.vring(index)?.running {
            return Err(self.refuse(format_args!("queue {index}: SET_VRING_NUM while it runs")));
        }
        if !num.is_power_of_two() || num < 2 || num > max {
            return Err(self.refuse(format_args!(
                "queue {index}: size {num} is not a power of two from 2 to {max} (the export's queue-size)"
            )));
        }
        self.vring(index)?.size = num as u16;
        Ok(())
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        let addresses = RingAddresses { descriptors: descriptor, available, used };
        let v = self.vring(index)?;
        if v.running {
            // Sent again when dirty logging is switched; only the log flag may differ.
            return match v.addresses == Some(addresses) {
                true => Ok(()),
                false => Err(self.refuse(format_args!("queue {index}: SET_VRING_ADDR moves a running ring"))),
            };
        }
        v.addresses = Some(addresses);
        Ok(())
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let v = self.vring(index)?;
        if v.running {
            return Err(self.refuse(format_args!("queue {index}: SET_VRING_BASE while it runs")));
        }
        let Ok(base) = u16::try_from(base) else {
            return Err(self.refuse(format_args!("queue {index}: base {base} is not a 16-bit index")));
        };
        self.vring(index)?.base = base;
        Ok(())
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.vring(index)?;
        self.stop(index as usize, true);
        let v = self.vring(index)?;
        // The ring is stopped: its descriptors are given back (the next start sends new ones).
        v.kick = None;
        v.call = None;
        v.err = None;
        Ok(VhostUserVringState::new(index, v.base.into()))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.vring(index.into())?;
        let Some(fd) = fd else {
            return Err(
                self.refuse(format_args!("queue {index}: a kick descriptor is needed (no polling mode)"))
            );
        };
        let kick = Kick::new(OwnedFd::from(fd))
            .map_err(|e| self.refuse(format_args!("queue {index}: kick descriptor: {e}")))?;
        let v = self.vring(index.into())?;
        if v.running {
            let copy = dup_kick(&kick)?;
            v.kick = Some(kick);
            self.device.set_kick(index.into(), copy);
            return Ok(());
        }
        v.kick = Some(kick);
        self.start_if_ready(index.into())
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.vring(index.into())?;
        let call = self.fds("call", index, fd)?;
        let copy = call.as_ref().map(dup).transpose()?.map(Call::Notifier);
        let v = self.vring(index.into())?;
        v.call = call;
        if v.running {
            self.device.set_call(index.into(), copy);
        }
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.vring(index.into())?;
        let err = self.fds("error", index, fd)?;
        let copy = err.as_ref().map(dup).transpose()?;
        let v = self.vring(index.into())?;
        v.err = err;
        if v.running {
            self.device.set_err(index.into(), copy);
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        Ok(self.offered())
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = self.offered() | VhostUserProtocolFeatures::REPLY_ACK;
        let unknown = features & !offered.bits();
        if unknown != 0 {
            return Err(self.refuse(format_args!("protocol features {unknown:#x} were not offered")));
        }
        self.protocol = VhostUserProtocolFeatures::from_bits_truncate(features);
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.vrings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        let v = self.vring(index)?;
        v.enabled = enable;
        if v.running {
            self.device.enable_queue(index as usize, enable);
            return Ok(());
        }
        if enable { self.start_if_ready(index as usize) } else { Ok(()) }
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        let offset = offset.checked_sub(OLD_CONFIG_OFFSET).unwrap_or(offset);
        Ok(self.device.get_config(offset, size))
    }

    fn set_config(&mut self, offset: u32, bytes: &[u8], flags: VhostUserConfigFlags) -> Result<()> {
        if flags.contains(VhostUserConfigFlags::LIVE_MIGRATION) {
            return Err(self.refuse("SET_CONFIG of a migration: not supported"));
        }
        let offset = offset.checked_sub(OLD_CONFIG_OFFSET).unwrap_or(offset);
        self.device.set_config(offset, bytes).map_err(|e| self.refuse(e))
    }

    fn set_gpu_socket(&mut self, _backend: GpuBackend) -> Result<()> {
        Err(self.refuse("GPU_SET_SOCKET on a block device"))
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        Err(self.refuse("GET_SHARED_OBJECT was not negotiated"))
    }

    fn get_inflight_fd(&mut self, wanted: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        self.check_inflight(wanted)?;
        let (queues, queue_size) = (wanted.num_queues, wanted.queue_size);
        let (fd, size) = InflightRegion::create(queues, queue_size).map_err(|e| self.refuse(e))?;
        Ok((VhostUserInflight::new(size, 0, queues, queue_size), File::from(fd)))
    }

    fn set_inflight_fd(&mut self, area: &VhostUserInflight, file: File) -> Result<()> {
        self.check_inflight(area)?;
        if self.vrings.iter().any(|v| v.running) {
            return Err(self.refuse("SET_INFLIGHT_FD while rings are running"));
        }
        let VhostUserInflight { mmap_size, mmap_offset, num_queues, queue_size } = *area;
        let area = InflightRegion::map(OwnedFd::from(file), mmap_offset, mmap_size, num_queues, queue_size);
        self.inflight = Some(Arc::new(area.map_err(|e| self.refuse(e))?));
        Ok(())
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _fd: File,
    ) -> Result<Option<File>> {
        // A stopped block device has no state of its own: nothing is written, nothing is expected. Closing the pipe
        // is the end of the (empty) state.
        match self.vrings.iter().any(|v| v.running) {
            true => Err(self.refuse("SET_DEVICE_STATE_FD while rings are running")),
            false => Ok(None),
        }
    }

    fn check_device_state(&mut self) -> Result<()> {
        Ok(())
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        Err(self.refuse("GET_SHMEM_CONFIG was not negotiated"))
    }

    fn set_log_base(&mut self, _log: &VhostUserLog, _file: File) -> Result<()> {
        Err(self.refuse("SET_LOG_BASE was not negotiated"))
    }
}
