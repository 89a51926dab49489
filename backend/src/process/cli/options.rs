//! The one table of options, and the `--help` text made from it.
//!
//! [`super::parse`] looks options up here; nothing about an option's name, value or help is written elsewhere.

/// What an option does; [`super::parse`] has one arm for each.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Print the help text.
    Help,
    /// Print the version.
    Version,
    /// Adjust the log.
    Trace,
    /// Add a node.
    Blockdev,
    /// Describe a control socket.
    Chardev,
    /// Add an export.
    Export,
    /// Open a QMP channel.
    Monitor,
    /// QEMU's built-in NBD server; refused.
    NbdServer,
    /// Create an object.
    Object,
    /// Go to the background.
    Daemonize,
    /// Write the process id.
    Pidfile,
    /// vhost-user convention: the socket to create.
    SocketPath,
    /// vhost-user convention: the inherited socket.
    Fd,
    /// vhost-user convention: the disk's file.
    BlkFile,
    /// vhost-user convention: a read-only disk.
    ReadOnly,
    /// vhost-user convention: describe the program.
    PrintCapabilities,
}

/// One option.
#[derive(Debug)]
pub struct OptionDef {
    /// What it does.
    pub kind: Kind,
    /// Its name without the dashes.
    pub long: &'static str,
    /// Its one-letter form.
    pub short: Option<char>,
    /// `None`: takes no value. Otherwise the lines describing the value, the first starting after the name.
    pub value: Option<&'static [&'static str]>,
    /// Its help, one entry a line.
    pub help: &'static [&'static str],
    /// Headline of the group that starts with this option.
    pub heading: Option<&'static str>,
}

const fn flag(kind: Kind, long: &'static str, help: &'static [&'static str]) -> OptionDef {
    OptionDef { kind, long, short: None, value: None, help, heading: None }
}

const fn valued(
    kind: Kind,
    long: &'static str,
    value: &'static [&'static str],
    help: &'static [&'static str],
) -> OptionDef {
    OptionDef { kind, long, short: None, value: Some(value), help, heading: None }
}

const fn headed(heading: &'static str, def: OptionDef) -> OptionDef {
    OptionDef { heading: Some(heading), ..def }
}

const fn short(letter: char, def: OptionDef) -> OptionDef {
    OptionDef { short: Some(letter), ..def }
}

/// Every option, in the order `--help` shows them.
pub static OPTIONS: &[OptionDef] = &[
    short('h', flag(Kind::Help, "help", &["display this help and exit"])),
    short('V', flag(Kind::Version, "version", &["output version information and exit"])),
    headed(
        "Applied in the order given; dotted keys or JSON",
        valued(
            Kind::Blockdev,
            "blockdev",
            &[
                "[driver=]DRIVER,node-name=NAME[,read-only=on|off]",
                "[,auto-read-only=on|off][,force-share=on|off]",
                "[,discard=ignore|unmap][,detect-zeroes=on|off|unmap]",
                "[,cache.direct=on|off][,cache.no-flush=on|off]",
                "[,MEMBER=VALUE...]",
            ],
            &[
                "add a node to the block graph",
                "(--blockdev help lists drivers, --blockdev DRIVER,help members)",
            ],
        ),
    ),
    valued(
        Kind::Object,
        "object",
        &["TYPE,id=ID[,PROPERTY=VALUE...]"],
        &["create an object", "(--object help lists types, --object TYPE,help properties)"],
    ),
    valued(
        Kind::Export,
        "export",
        &[
            "[type=]vhost-user-blk,id=ID,node-name=NAME,",
            "addr.type=unix,addr.path=PATH | addr.type=fd,addr.str=FD",
            "[,writable=on|off][,writethrough=on|off]",
            "[,num-queues=N][,logical-block-size=BYTES]",
            "[,iothread=ID][,MEMBER=VALUE...]",
        ],
        &[
            "export a node as a vhost-user-blk device",
            "FD is an inherited socket: a number, or a name in $LISTEN_FDNAMES",
            "(--export help lists types, --export TYPE,help members)",
        ],
    ),
    valued(
        Kind::Chardev,
        "chardev",
        &["socket,id=ID,path=PATH|fd=FD[,server=on|off][,wait=on|off]"],
        &[
            "describe a unix socket for --monitor",
            "(start-up never waits for a client: wait=on is taken as wait=off)",
        ],
    ),
    valued(
        Kind::Monitor,
        "monitor",
        &["[chardev=]ID[,id=NAME][,mode=control][,pretty=on|off]"],
        &["open a QMP control channel on a chardev"],
    ),
    valued(Kind::NbdServer, "nbd-server", &["..."], &["not supported by this build"]),
    short(
        'T',
        valued(
            Kind::Trace,
            "trace",
            &["[[enable=]PATTERN][,events=FILE][,file=FILE]"],
            &["log these targets in full (-T help lists targets)"],
        ),
    ),
    headed(
        "The process",
        flag(
            Kind::Daemonize,
            "daemonize",
            &["go to the background; the command returns once start-up is", "complete, with its status"],
        ),
    ),
    valued(
        Kind::Pidfile,
        "pidfile",
        &["PATH"],
        &["write the process ID to a locked file once sockets accept"],
    ),
    headed(
        "vhost-user backend conventions: one raw disk, in place of --blockdev and --export",
        valued(Kind::SocketPath, "socket-path", &["PATH"], &["listen on this unix socket; excludes --fd"]),
    ),
    valued(
        Kind::Fd,
        "fd",
        &["FDNUM"],
        &[
            "use this inherited socket, listening or connected: a number,",
            "or a name in $LISTEN_FDNAMES; excludes --socket-path",
        ],
    ),
    valued(Kind::BlkFile, "blk-file", &["PATH"], &["the disk's file or block device, raw format"]),
    flag(Kind::ReadOnly, "read-only", &["open the disk read-only"]),
    flag(
        Kind::PrintCapabilities,
        "print-capabilities",
        &["print what this backend can do as JSON and exit;", "all other options are ignored"],
    ),
];

/// What follows the options in `--help`.
const TRAILER: &str = "\
Examples:
  ringblk --blockdev file,node-name=f,filename=disk.qcow2 \\
          --blockdev qcow2,node-name=disk,file=f \\
          --export vhost-user-blk,id=e,node-name=disk,writable=on,addr.type=unix,addr.path=vhost.sock \\
          --chardev socket,id=c,path=qmp.sock,server=on,wait=off --monitor c
  ringblk --socket-path=vhost.sock --blk-file=disk.raw

Exit status:
  0    ended as asked (signal or QMP quit), or printed what was asked for
  1    bad option or configuration, failed start, or a failure that ended the daemon
  101  a defect in ringblk; please report it with the message

Environment:
  RINGBLK_LOG                        LEVEL or TARGET=LEVEL, comma separated; LEVEL is
                                     off, error, warn, info, debug or trace
  LISTEN_FDS, LISTEN_PID,            sockets passed by systemd or a spawner; named vhost,
  LISTEN_FDNAMES                     qmp, or as an export says
  NOTIFY_SOCKET                      told of readiness and shutdown
";

/// Column at which help texts start.
const COLUMN: usize = 25;

/// The complete `--help` text.
#[must_use]
pub fn help_text() -> String {
    let mut out = String::from(
        "Usage: ringblk [options]\n       ringblk img COMMAND [arguments]\n       ringblk ctl [COMMAND [arguments]]\n\
             Serve virtual disks to guests over vhost-user-blk; create, inspect and convert images\n\
             (ringblk img --help); look at and steer a running daemon (ringblk ctl --help).\n\n",
    );
    for def in OPTIONS {
        if let Some(heading) = def.heading {
            out.push_str(&format!("\n{heading}:\n\n"));
        }
        let mut left = match def.short {
            Some(letter) => format!("  -{letter}, --{}", def.long),
            None => format!("  --{}", def.long),
        };
        let indent = left.len() + 1;
        let lines = def.value.unwrap_or_default();
        if let Some(first) = lines.first() {
            left.push_str(&format!(" {first}"));
        }
        for line in lines.iter().skip(1) {
            left.push_str(&format!("\n{:indent$}{line}", ""));
        }
        // Help starts beside what leaves room for it, and on a line of its own otherwise.
        let room = COLUMN.checked_sub(left.len()).filter(|&n| n > 1);
        out.push_str(&left);
        if room.is_none() {
            out.push('\n');
        }
        for (index, line) in def.help.iter().enumerate() {
            let pad = if index == 0 { room.unwrap_or(COLUMN) } else { COLUMN };
            out.push_str(&format!("{:pad$}{line}\n", ""));
        }
    }
    out.push('\n');
    out.push_str(TRAILER);
    out
}

/// The `--version` text.
#[must_use]
pub fn version_text() -> String {
    format!("ringblk version {}\n", env!("CARGO_PKG_VERSION"))
}

/// The `--print-capabilities` text (vhost-user.rst, "Backend program conventions").
#[must_use]
pub fn capabilities_text() -> String {
    "{\"type\":\"block\",\"features\":[\"read-only\",\"blk-file\"]}\n".to_owned()
}
