//! The one error type of the graph and its drivers: a class, an error number, words, and the cause.
//!
//! Built by everything below the control channel; the control channel turns class and words into its reply, a
//! request source turns the number into a status. Must not decide policy (retry, stop, report): that is its reader's.

use std::borrow::Cow;
use std::error::Error as StdError;
use std::fmt;
use std::io;

/// Result of everything that can fail in the graph.
pub type Result<T> = std::result::Result<T, BlockError>;

/// A positive error number of the kernel (`EIO` = 5). What a request's completion is made of: plain and `Copy`.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Errno(i32);

impl Errno {
    /// Input/output error: also "out of bounds" for the user of a root.
    pub const EIO: Errno = Errno(libc::EIO);
    /// Not permitted: a write to a read-only node, a permission that conflicts.
    pub const EPERM: Errno = Errno(libc::EPERM);
    /// Access refused by the file system.
    pub const EACCES: Errno = Errno(libc::EACCES);
    /// An argument makes no sense.
    pub const EINVAL: Errno = Errno(libc::EINVAL);
    /// The operation does not exist here; the graph may have another way.
    pub const ENOTSUP: Errno = Errno(libc::ENOTSUP);
    /// No space left.
    pub const ENOSPC: Errno = Errno(libc::ENOSPC);
    /// In use by somebody else.
    pub const EBUSY: Errno = Errno(libc::EBUSY);
    /// Try again: held by somebody else for now (a file lock).
    pub const EAGAIN: Errno = Errno(libc::EAGAIN);
    /// Nothing of that name.
    pub const ENOENT: Errno = Errno(libc::ENOENT);
    /// Something of that name is there already.
    pub const EEXIST: Errno = Errno(libc::EEXIST);
    /// No memory.
    pub const ENOMEM: Errno = Errno(libc::ENOMEM);
    /// A file or offset is too large.
    pub const EFBIG: Errno = Errno(libc::EFBIG);
    /// The device has gone.
    pub const ENODEV: Errno = Errno(libc::ENODEV);
    /// A computation left its range.
    pub const ERANGE: Errno = Errno(libc::ERANGE);
    /// Given up on request.
    pub const ECANCELED: Errno = Errno(libc::ECANCELED);
    /// The other end took too long.
    pub const ETIMEDOUT: Errno = Errno(libc::ETIMEDOUT);

    /// From a number of the kernel in either sign; 0 and nonsense become `EIO`, so that an error stays an error.
    pub fn from_raw(n: i32) -> Errno {
        match n.unsigned_abs() {
            0 | 4096.. => Errno::EIO,
            n => Errno(n as i32),
        }
    }

    /// The positive number.
    pub fn raw(self) -> i32 {
        self.0
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Errno({})", self.0)
    }
}

impl fmt::Display for Errno {
    /// The kernel's words without Rust's "(os error N)".
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = io::Error::from_raw_os_error(self.0).to_string();
        f.write_str(text.split(" (os error").next().unwrap_or(&text))
    }
}

/// What kind of failure this is, as far as a control client is told different classes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum ErrorKind {
    /// Everything without a class of its own.
    Generic,
    /// A named node or device does not exist.
    DeviceNotFound,
    /// A named thing exists and is not in a state to do this.
    DeviceNotActive,
}

struct Inner {
    kind: ErrorKind,
    errno: Errno,
    message: Cow<'static, str>,
    source: Option<Box<dyn StdError + Send + Sync + 'static>>,
}

/// An error with its number, its words and what caused it. One pointer wide, so that results stay small.
pub struct BlockError(Box<Inner>);

impl BlockError {
    /// A failure of class [`ErrorKind::Generic`] with its number and words.
    pub fn new(errno: Errno, message: impl Into<Cow<'static, str>>) -> BlockError {
        BlockError(Box::new(Inner { kind: ErrorKind::Generic, errno, message: message.into(), source: None }))
    }

    /// Bad input of a control client (`EINVAL`): the words say what to do.
    pub fn invalid(message: impl Into<Cow<'static, str>>) -> BlockError {
        BlockError::new(Errno::EINVAL, message)
    }

    /// A named thing that does not exist (`ENOENT`, [`ErrorKind::DeviceNotFound`]).
    pub fn not_found(message: impl Into<Cow<'static, str>>) -> BlockError {
        BlockError::new(Errno::ENOENT, message).with_kind(ErrorKind::DeviceNotFound)
    }

    /// The operation does not exist here (`ENOTSUP`).
    pub fn unsupported(message: impl Into<Cow<'static, str>>) -> BlockError {
        BlockError::new(Errno::ENOTSUP, message)
    }

    /// The number alone, for data-path errors that nobody reads as text.
    pub fn errno_only(errno: Errno) -> BlockError {
        BlockError::new(errno, Cow::Borrowed(""))
    }

    /// An error of the kernel in the context `what` ("Could not open 'x'"): shown as `what: the kernel's words`.
    pub fn io(what: impl Into<Cow<'static, str>>, e: io::Error) -> BlockError {
        let errno = Errno::from_raw(e.raw_os_error().unwrap_or(libc::EIO));
        BlockError::new(errno, what).with_source(e)
    }

    /// The same error in another class.
    #[must_use]
    pub fn with_kind(mut self, kind: ErrorKind) -> BlockError {
        self.0.kind = kind;
        self
    }

    /// The same error with its cause.
    #[must_use]
    pub fn with_source(mut self, source: impl StdError + Send + Sync + 'static) -> BlockError {
        self.0.source = Some(Box::new(source));
        self
    }

    /// This error inside a wider one; class and number stay.
    #[must_use]
    pub fn context(self, what: impl Into<Cow<'static, str>>) -> BlockError {
        let (kind, errno) = (self.kind(), self.errno());
        BlockError::new(errno, what).with_kind(kind).with_source(self)
    }

    /// The class.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// The number for a request's completion; never 0.
    pub fn errno(&self) -> Errno {
        self.0.errno
    }
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0;
        match (inner.message.as_ref(), &inner.source) {
            ("", None) => fmt::Display::fmt(&inner.errno, f),
            ("", Some(source)) => show_source(source.as_ref(), f),
            (message, None) => f.write_str(message),
            (message, Some(source)) => {
                write!(f, "{message}: ")?;
                show_source(source.as_ref(), f)
            }
        }
    }
}

/// A kernel error inside is shown in the kernel's words alone, as C programs do.
fn show_source(source: &(dyn StdError + 'static), f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match source.downcast_ref::<io::Error>().and_then(io::Error::raw_os_error) {
        Some(n) => fmt::Display::fmt(&Errno::from_raw(n), f),
        None => fmt::Display::fmt(source, f),
    }
}

impl fmt::Debug for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "BlockError({:?}, errno {}, {self})", self.0.kind, self.0.errno.0)
    }
}

impl StdError for BlockError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        self.0.source.as_deref().map(|e| e as &(dyn StdError + 'static))
    }
}

impl From<Errno> for BlockError {
    fn from(errno: Errno) -> BlockError {
        BlockError::errno_only(errno)
    }
}

impl From<io::Error> for BlockError {
    fn from(e: io::Error) -> BlockError {
        BlockError::io("", e)
    }
}
