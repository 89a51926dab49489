//! Numbers and layouts of the vhost-user protocol, front-end side.
//!
//! Used by `connection`, `frontend`, `channel` and by tests that build messages by hand. It holds no state and
//! does no I/O. "VU" below is the vhost-user specification (docs/interop/vhost-user.rst of QEMU 10).

/// Bytes of the header: request, flags, payload size (VU "Message Specification").
pub const HEADER_SIZE: usize = 12;

/// Version in the two low bits of `flags`.
pub const FLAG_VERSION: u32 = 0x1;
/// The message is a reply.
pub const FLAG_REPLY: u32 = 0x4;
/// The sender wants an acknowledgement (only with REPLY_ACK negotiated).
pub const FLAG_NEED_REPLY: u32 = 0x8;

/// In the u64 of SET_VRING_KICK/CALL/ERR: no descriptor comes along (VU "VHOST_USER_SET_VRING_CALL").
pub const VRING_NO_FD: u64 = 1 << 8;

/// Front-end requests (VU "Front-end message types"). Plain numbers, so that a test can send any other.
#[allow(missing_docs)] // the names are the specification's own
pub mod request {
    pub const GET_FEATURES: u32 = 1;
    pub const SET_FEATURES: u32 = 2;
    pub const SET_OWNER: u32 = 3;
    pub const RESET_OWNER: u32 = 4;
    pub const SET_MEM_TABLE: u32 = 5;
    pub const SET_LOG_BASE: u32 = 6;
    pub const SET_LOG_FD: u32 = 7;
    pub const SET_VRING_NUM: u32 = 8;
    pub const SET_VRING_ADDR: u32 = 9;
    pub const SET_VRING_BASE: u32 = 10;
    pub const GET_VRING_BASE: u32 = 11;
    pub const SET_VRING_KICK: u32 = 12;
    pub const SET_VRING_CALL: u32 = 13;
    pub const SET_VRING_ERR: u32 = 14;
    pub const GET_PROTOCOL_FEATURES: u32 = 15;
    pub const SET_PROTOCOL_FEATURES: u32 = 16;
    pub const GET_QUEUE_NUM: u32 = 17;
    pub const SET_VRING_ENABLE: u32 = 18;
    pub const SET_BACKEND_REQ_FD: u32 = 21;
    pub const GET_CONFIG: u32 = 24;
    pub const SET_CONFIG: u32 = 25;
    pub const GET_INFLIGHT_FD: u32 = 31;
    pub const SET_INFLIGHT_FD: u32 = 32;
    pub const RESET_DEVICE: u32 = 34;
    pub const VRING_KICK: u32 = 35;
    pub const GET_MAX_MEM_SLOTS: u32 = 36;
    pub const ADD_MEM_REG: u32 = 37;
    pub const REM_MEM_REG: u32 = 38;
    pub const SET_STATUS: u32 = 39;
    pub const GET_STATUS: u32 = 40;
    pub const SET_DEVICE_STATE_FD: u32 = 42;
    pub const CHECK_DEVICE_STATE: u32 = 43;
}

/// Back-end requests (VU "Back-end message types").
pub mod backend_request {
    /// The configuration space changed; the front end is to read it again.
    pub const CONFIG_CHANGE_MSG: u32 = 2;
}

/// Bits of GET/SET_PROTOCOL_FEATURES (VU "Protocol features"), as masks.
#[allow(missing_docs)]
pub mod protocol {
    pub const MQ: u64 = 1 << 0;
    pub const LOG_SHMFD: u64 = 1 << 1;
    pub const REPLY_ACK: u64 = 1 << 3;
    pub const BACKEND_REQ: u64 = 1 << 5;
    pub const PAGEFAULT: u64 = 1 << 8;
    pub const CONFIG: u64 = 1 << 9;
    pub const BACKEND_SEND_FD: u64 = 1 << 10;
    pub const HOST_NOTIFIER: u64 = 1 << 11;
    pub const INFLIGHT_SHMFD: u64 = 1 << 12;
    pub const RESET_DEVICE: u64 = 1 << 13;
    pub const CONFIGURE_MEM_SLOTS: u64 = 1 << 15;
    pub const STATUS: u64 = 1 << 16;
    pub const DEVICE_STATE: u64 = 1 << 19;
}

/// Device-independent bits of GET/SET_FEATURES, as masks (virtio 1.3 §6; VU for LOG_ALL and PROTOCOL_FEATURES).
#[allow(missing_docs)]
pub mod feature {
    pub const VHOST_LOG_ALL: u64 = 1 << 26;
    pub const INDIRECT_DESC: u64 = 1 << 28;
    pub const EVENT_IDX: u64 = 1 << 29;
    pub const VHOST_USER_PROTOCOL_FEATURES: u64 = 1 << 30;
    pub const VERSION_1: u64 = 1 << 32;
    pub const ACCESS_PLATFORM: u64 = 1 << 33;
    pub const RING_PACKED: u64 = 1 << 34;
    pub const IN_ORDER: u64 = 1 << 35;
}

/// Header of a message.
#[must_use]
pub fn header(request: u32, flags: u32, size: u32) -> [u8; HEADER_SIZE] {
    let mut bytes = [0; HEADER_SIZE];
    bytes[0..4].copy_from_slice(&request.to_le_bytes());
    bytes[4..8].copy_from_slice(&flags.to_le_bytes());
    bytes[8..12].copy_from_slice(&size.to_le_bytes());
    bytes
}

/// One memory region as it is sent (VU "Memory region description"): 32 bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryRegion {
    /// Guest physical address.
    pub guest_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// Address in the front end's address space; ring addresses are given in these terms.
    pub user_addr: u64,
    /// Where the region starts in the descriptor that comes along.
    pub mmap_offset: u64,
}

impl MemoryRegion {
    /// The 32 bytes of the wire.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        words(&[self.guest_addr, self.size, self.user_addr, self.mmap_offset])
    }
}

/// Payload of SET_MEM_TABLE: count, padding, regions (VU "Multiple Memory regions description").
#[must_use]
pub fn memory_table(regions: &[MemoryRegion]) -> Vec<u8> {
    let mut out = Vec::with_capacity(8 + regions.len() * 32);
    out.extend_from_slice(&(regions.len() as u32).to_le_bytes());
    out.extend_from_slice(&[0; 4]);
    for region in regions {
        out.extend_from_slice(&region.encode());
    }
    out
}

/// Payload of ADD_MEM_REG and REM_MEM_REG: padding, one region (VU "Single memory region description").
#[must_use]
pub fn single_region(region: &MemoryRegion) -> Vec<u8> {
    let mut out = vec![0; 8];
    out.extend_from_slice(&region.encode());
    out
}

/// Payload of SET_VRING_ADDR (VU "A vring address description"); addresses are front-end addresses.
#[derive(Clone, Copy, Debug, Default)]
pub struct VringAddr {
    /// Ring number.
    pub index: u32,
    /// Bit 0: log writes to the used ring.
    pub flags: u32,
    /// Descriptor table.
    pub desc: u64,
    /// Used ring (device area).
    pub used: u64,
    /// Available ring (driver area).
    pub avail: u64,
    /// Guest physical address used to log writes to the used ring.
    pub log: u64,
}

impl VringAddr {
    /// The 40 bytes of the wire.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut out = state(self.index, self.flags);
        out.extend_from_slice(&words(&[self.desc, self.used, self.avail, self.log]));
        out
    }
}

/// Payload of two u32, the "vring state": ring number and value.
#[must_use]
pub fn state(index: u32, value: u32) -> Vec<u8> {
    let mut out = index.to_le_bytes().to_vec();
    out.extend_from_slice(&value.to_le_bytes());
    out
}

/// Payload made of little-endian u64.
#[must_use]
pub fn words(values: &[u64]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

/// Payload of GET_CONFIG/SET_CONFIG (VU "Virtio device config space"): offset, size, flags, bytes.
#[must_use]
pub fn config(offset: u32, flags: u32, bytes: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(12 + bytes.len());
    out.extend_from_slice(&offset.to_le_bytes());
    out.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
    out.extend_from_slice(&flags.to_le_bytes());
    out.extend_from_slice(bytes);
    out
}

/// Reads a little-endian u16 at `at`, `None` past the end.
#[must_use]
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_le_bytes(bytes.get(at..at.checked_add(2)?)?.try_into().ok()?))
}

/// Reads a little-endian u32 at `at`, `None` past the end.
#[must_use]
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_le_bytes(bytes.get(at..at.checked_add(4)?)?.try_into().ok()?))
}

/// Reads a little-endian u64 at `at`, `None` past the end.
#[must_use]
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    Some(u64::from_le_bytes(bytes.get(at..at.checked_add(8)?)?.try_into().ok()?))
}
