//! A whole vhost-user-blk session: set-up in the order of a real VMM, stop, reconnect.
//!
//! Used by `disk` and by tests. The orders are those of QEMU 10 (hw/block/vhost-user-blk.c, hw/virtio/vhost.c) and
//! of cloud-hypervisor (virtio-devices/src/vhost_user); a test that wants another order talks to `Frontend`. What
//! survives a connection (memory, rings, in-flight area, negotiated features) is the `Guest`.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::time::Duration;

use rustix::event::{EventfdFlags, eventfd};

use crate::blk;
use crate::channel::Channel;
use crate::connection::Connection;
use crate::error::{Error, Result};
use crate::frontend::Frontend;
use crate::inflight::Inflight;
use crate::memory::GuestMemory;
use crate::queue::Queue;
use crate::wire::{MemoryRegion, feature, protocol};

/// Whose order of messages to follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// GET_* first also on reconnect; rings enabled at the end; rings continue from the used index after a crash.
    Qemu,
    /// On reconnect the old protocol features are set without asking; rings continue from the available index.
    CloudHypervisor,
}

/// What a session is to look like. Start from `Setup::default()`.
#[derive(Clone, Debug)]
pub struct Setup {
    /// Whose order.
    pub order: Order,
    /// Rings to set up.
    pub queues: u16,
    /// Entries per ring, a power of two.
    pub queue_size: u16,
    /// Virtio features to accept where offered.
    pub features: u64,
    /// Protocol features to accept where offered.
    pub protocol: u64,
    /// Guest memory: (guest address, bytes) per region.
    pub memory: Vec<(u64, u64)>,
    /// Bytes of configuration space to read.
    pub config_size: u32,
    /// Limit on each wait.
    pub limit: Duration,
}

impl Default for Setup {
    fn default() -> Self {
        Self {
            order: Order::Qemu,
            queues: 1,
            queue_size: 128,
            // LOG_ALL only during migration; packed rings, IN_ORDER and the IOMMU are not driven here.
            features: !(feature::VHOST_LOG_ALL
                | feature::RING_PACKED
                | feature::IN_ORDER
                | feature::ACCESS_PLATFORM),
            protocol: protocol::MQ
                | protocol::REPLY_ACK
                | protocol::BACKEND_REQ
                | protocol::CONFIG
                | protocol::INFLIGHT_SHMFD
                | protocol::RESET_DEVICE
                | protocol::CONFIGURE_MEM_SLOTS
                | protocol::LOG_SHMFD
                | protocol::DEVICE_STATE,
            // Two regions with a hole between, as around the 32-bit PCI hole of a PC.
            memory: vec![(0, 64 << 20), (4 << 30, 64 << 20)],
            config_size: blk::CONFIG_SIZE_CLOUD_HYPERVISOR,
            limit: crate::connection::DEFAULT_LIMIT,
        }
    }
}

/// What outlives a connection. The default is an empty one, a placeholder while the real one is elsewhere.
#[derive(Debug, Default)]
pub struct Guest {
    /// Guest memory.
    pub memory: GuestMemory,
    /// Rings by number.
    pub queues: Vec<Queue>,
    /// Area of requests in flight, once a backend made one.
    pub inflight: Option<Inflight>,
    /// Features negotiated last; 0 before the first session.
    pub features: u64,
    /// Protocol features negotiated last.
    pub protocol: u64,
    /// Configuration space as the VMM keeps it for the guest.
    pub config: blk::Config,
}

impl Guest {
    /// Memory and rings as `setup` wants them.
    ///
    /// # Errors
    /// `Io` or `Usage` when memory does not suffice.
    pub fn new(setup: &Setup) -> Result<Self> {
        let mut memory = GuestMemory::new(&setup.memory)?;
        let queues = (0..setup.queues)
            .map(|index| Queue::new(&mut memory, index, setup.queue_size))
            .collect::<Result<_>>()?;
        Ok(Self { memory, queues, ..Self::default() })
    }
}

/// A running session.
#[derive(Debug)]
pub struct Session {
    /// The message layer.
    pub frontend: Frontend,
    /// Memory and rings.
    pub guest: Guest,
    /// The backend's request channel, when negotiated.
    pub channel: Option<Channel>,
    /// Configuration space as read during set-up.
    pub config: blk::Config,
    setup: Setup,
    /// Regions the backend knows on this connection.
    sent: Vec<MemoryRegion>,
}

/// Where a ring continues.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// From what GET_VRING_BASE said, or 0 at the first start.
    At(u16),
    /// After a lost connection: QEMU takes the used index, cloud-hypervisor the available index.
    Lost,
}

impl Session {
    /// Connects to `socket` and sets everything up with fresh memory.
    ///
    /// # Errors
    /// Those of the steps.
    pub fn connect(socket: &Path, setup: &Setup) -> Result<Self> {
        let connection = Connection::connect(socket, setup.limit)?;
        Self::establish(connection, Guest::new(setup)?, setup, &[])
    }

    /// Connects to `socket` again with the guest of a lost session; every ring continues as its VMM would.
    ///
    /// # Errors
    /// Those of the steps.
    pub fn reconnect(socket: &Path, guest: Guest, setup: &Setup) -> Result<Self> {
        let connection = Connection::connect(socket, setup.limit)?;
        let bases = vec![Base::Lost; guest.queues.len()];
        Self::establish(connection, guest, setup, &bases)
    }

    /// Sets up `guest` over a connection; `bases` says where each ring continues (missing = from 0).
    ///
    /// # Errors
    /// Those of the steps; `Protocol` when the backend lacks what a vhost-user-blk front end cannot do without.
    pub fn establish(connection: Connection, guest: Guest, setup: &Setup, bases: &[Base]) -> Result<Self> {
        let mut frontend = Frontend::new(connection);
        frontend.connection_mut().set_limit(setup.limit);
        let config = guest.config.clone();
        let mut session =
            Self { frontend, guest, channel: None, config, setup: setup.clone(), sent: Vec::new() };
        session.negotiate()?;
        session.start(bases)?;
        Ok(session)
    }

    /// Everything up to the configuration space, which is what a VMM does before the guest's driver starts.
    fn negotiate(&mut self) -> Result<()> {
        let front = &mut self.frontend;
        let order = self.setup.order;
        let again = self.guest.features != 0;
        // A running driver keeps its features: a bit the new backend lacks is lost, a new one is not taken up.
        let wanted = if again { self.guest.features } else { self.setup.features };
        if order == Order::CloudHypervisor {
            front.set_owner()?;
        }
        if order == Order::CloudHypervisor && again {
            front.set_protocol_features(self.guest.protocol)?;
            self.guest.features = front.get_features()? & wanted;
            if self.guest.protocol & protocol::BACKEND_REQ != 0 {
                self.channel = Some(front.open_channel()?);
            }
            return Ok(());
        }
        let offered = front.get_features()?;
        if offered & feature::VHOST_USER_PROTOCOL_FEATURES == 0 {
            return Err(Error::Protocol(format!("features {offered:#x} lack PROTOCOL_FEATURES")));
        }
        let accepted = front.get_protocol_features()? & self.setup.protocol;
        if accepted & protocol::CONFIG == 0 {
            return Err(Error::Protocol("the backend does not offer CONFIG".into()));
        }
        front.set_protocol_features(accepted)?;
        if accepted & protocol::MQ != 0 {
            let available = front.get_queue_num()?;
            if available < self.guest.queues.len() as u64 {
                return Err(Error::Protocol(format!(
                    "the backend has {available} queues, {} are wanted",
                    self.guest.queues.len()
                )));
            }
        } else if self.guest.queues.len() > 1 {
            return Err(Error::Protocol("several queues without MQ".into()));
        }
        if order == Order::Qemu && accepted & protocol::CONFIGURE_MEM_SLOTS != 0 {
            front.get_max_mem_slots()?;
        }
        if accepted & protocol::BACKEND_REQ != 0 {
            self.channel = Some(front.open_channel()?);
        }
        if order == Order::Qemu {
            front.set_owner()?;
            front.get_features()?;
            // QEMU points each ring at a masked notifier until the driver has an interrupt for it.
            for queue in &self.guest.queues {
                let masked = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)
                    .map_err(Error::io("eventfd"))?;
                front.set_vring_call(queue.index() as u8, Some(masked.as_fd()))?;
            }
        }
        let flags = u32::from(order == Order::CloudHypervisor);
        self.config = blk::Config::parse(&front.get_config(0, self.setup.config_size, flags)?);
        self.guest.config = self.config.clone();
        self.guest.features = front.offered & wanted;
        self.guest.protocol = accepted;
        Ok(())
    }

    /// Features, memory, rings: what a VMM does when the driver says it is ready.
    ///
    /// # Errors
    /// Those of the messages.
    pub fn start(&mut self, bases: &[Base]) -> Result<()> {
        let features = self.guest.features;
        for queue in &mut self.guest.queues {
            queue.set_event_idx(features & feature::EVENT_IDX != 0);
        }
        match self.setup.order {
            Order::Qemu => self.start_qemu(bases, features),
            Order::CloudHypervisor => self.start_cloud_hypervisor(bases, features),
        }
    }

    fn start_qemu(&mut self, bases: &[Base], features: u64) -> Result<()> {
        self.frontend.set_features(features)?;
        self.share_inflight()?;
        self.frontend.set_features(features)?;
        self.send_memory(self.guest.protocol & protocol::CONFIGURE_MEM_SLOTS != 0)?;
        for queue in &self.guest.queues {
            let index = u32::from(queue.index());
            self.frontend.set_vring_num(index, u32::from(queue.size()))?;
            self.frontend.set_vring_base(index, u32::from(self.base(queue, bases)))?;
            self.frontend.set_vring_addr(&queue.vring_addr())?;
            self.frontend.set_vring_kick(queue.index() as u8, Some(queue.kick_fd()))?;
        }
        for queue in &self.guest.queues {
            self.frontend.set_vring_enable(u32::from(queue.index()), true)?;
        }
        for queue in &self.guest.queues {
            self.frontend.set_vring_call(queue.index() as u8, Some(queue.call_fd()))?;
        }
        Ok(())
    }

    fn start_cloud_hypervisor(&mut self, bases: &[Base], features: u64) -> Result<()> {
        self.frontend.set_features(features)?;
        self.send_memory(false)?;
        for queue in &self.guest.queues {
            self.frontend.set_vring_num(u32::from(queue.index()), u32::from(queue.size()))?;
        }
        self.share_inflight()?;
        for queue in &self.guest.queues {
            self.frontend.set_vring_addr(&queue.vring_addr())?;
            let base = self.base(queue, bases);
            self.frontend.set_vring_base(u32::from(queue.index()), u32::from(base))?;
            self.frontend.set_vring_call(queue.index() as u8, Some(queue.call_fd()))?;
            self.frontend.set_vring_kick(queue.index() as u8, Some(queue.kick_fd()))?;
        }
        for queue in &self.guest.queues {
            self.frontend.set_vring_enable(u32::from(queue.index()), true)?;
        }
        Ok(())
    }

    fn base(&self, queue: &Queue, bases: &[Base]) -> u16 {
        match bases.get(usize::from(queue.index())) {
            None => 0,
            Some(Base::At(value)) => *value,
            Some(Base::Lost) => match self.setup.order {
                Order::Qemu => queue.used_idx(),
                Order::CloudHypervisor => queue.available_idx(),
            },
        }
    }

    fn share_inflight(&mut self) -> Result<()> {
        if self.guest.protocol & protocol::INFLIGHT_SHMFD == 0 {
            return Ok(());
        }
        if self.guest.inflight.is_none() {
            let queues = self.guest.queues.len() as u16;
            let (description, fd) = self.frontend.get_inflight_fd(queues, self.setup.queue_size)?;
            self.guest.inflight = Some(Inflight::new(description, fd)?);
        }
        match &self.guest.inflight {
            Some(inflight) => self.frontend.set_inflight_fd(inflight.description(), inflight.fd()),
            None => Ok(()),
        }
    }

    /// Sends the memory regions: as one table, or (`slots`) one message for each change since the last time on this
    /// connection, removals first, as QEMU does.
    ///
    /// # Errors
    /// Those of the messages.
    pub fn send_memory(&mut self, slots: bool) -> Result<()> {
        let table: Vec<(MemoryRegion, BorrowedFd<'_>)> =
            self.guest.memory.regions().iter().map(|region| (region.describe(), region.fd())).collect();
        let now: Vec<MemoryRegion> = table.iter().map(|(region, _)| *region).collect();
        if slots {
            for gone in self.sent.iter().filter(|region| !now.contains(region)) {
                self.frontend.rem_mem_reg(gone)?;
            }
            for (region, fd) in table.iter().filter(|(region, _)| !self.sent.contains(region)) {
                self.frontend.add_mem_reg(region, *fd)?;
            }
        } else {
            self.frontend.set_mem_table(&table)?;
        }
        self.sent = now;
        Ok(())
    }

    /// Stops all rings as a VMM does on guest shutdown, reset or migration; where each would continue.
    ///
    /// # Errors
    /// Those of the messages.
    pub fn stop(&self) -> Result<Vec<Base>> {
        for queue in &self.guest.queues {
            self.frontend.set_vring_enable(u32::from(queue.index()), false)?;
        }
        self.guest
            .queues
            .iter()
            .map(|queue| Ok(Base::At(self.frontend.get_vring_base(u32::from(queue.index()))? as u16)))
            .collect()
    }

    /// Reads the configuration space again.
    ///
    /// # Errors
    /// Those of GET_CONFIG.
    pub fn refresh_config(&mut self) -> Result<&blk::Config> {
        let bytes = self.frontend.get_config(0, self.setup.config_size, 0)?;
        self.config = blk::Config::parse(&bytes);
        self.guest.config = self.config.clone();
        Ok(&self.config)
    }

    /// The set-up this session was made with.
    #[must_use]
    pub fn setup(&self) -> &Setup {
        &self.setup
    }

    /// Closes the connection and keeps the guest.
    #[must_use]
    pub fn disconnect(self) -> Guest {
        self.guest
    }
}
