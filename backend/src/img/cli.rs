//! The arguments of `ringblk img`: qemu-img's names and meanings, as clap reads them.
//!
//! Parsed once by [`super::main`]; each command gets its struct. Opens nothing. Where it differs from qemu-img on purpose:
//! the format of an image that is opened has to be given (`-f`, `--image-opts`); it is never guessed, except by `info`.

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Create, inspect, convert and repair disk images.
#[derive(Debug, Parser)]
#[command(
    name = "ringblk img",
    bin_name = "ringblk img",
    version,
    disable_help_subcommand = true,
    args_override_self = true,
    after_help = "The format of an image is never guessed: give -f FORMAT or --image-opts. Exit status: 0 done, 1 failed; \
                  check: 2 corrupt, 3 leaks, 63 no checks; compare: 1 different, 2 or more failed."
)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Log these targets in full on stderr ([enable=]PATTERN).
    #[arg(short = 'T', long = "trace", value_name = "TRACE", global = false)]
    pub trace: Vec<String>,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Change the persistent bitmaps of an image.
    Bitmap(BitmapArgs),
    /// Check an image for leaks and corruption, and repair it.
    Check(CheckArgs),
    /// Compare the contents of two images.
    Compare(CompareArgs),
    /// Copy images into another one, of another format if need be.
    Convert(ConvertArgs),
    /// Create an image.
    Create(CreateArgs),
    /// Tell what is known about an image.
    Info(InfoArgs),
    /// Tell where the data of an image lies.
    Map(MapArgs),
    /// Calculate the size of the file an image would need.
    Measure(MeasureArgs),
    /// Change the size of an image.
    Resize(ResizeArgs),
    /// List, create, apply or delete the snapshots inside an image.
    Snapshot(SnapshotArgs),
}

/// How results are written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people, in qemu-img's words.
    #[default]
    Human,
    /// For programs, in qemu-img's members.
    Json,
}

/// `--object`, wherever an image is opened.
#[derive(Debug, Args)]
pub struct Objects {
    /// Create an object first, e.g. secret,id=ID,file=PATH for the key of an encrypted image.
    #[arg(long = "object", value_name = "OBJDEF")]
    pub objects: Vec<String>,
}

/// How the one image of a command is named.
#[derive(Debug, Args)]
pub struct Source {
    /// Format of the image.
    #[arg(short = 'f', long = "format", value_name = "FMT")]
    pub format: Option<String>,
    /// FILENAME holds options as of --blockdev (driver=FMT,file.filename=PATH,...) instead of a name.
    #[arg(long = "image-opts")]
    pub image_opts: bool,
    /// Objects.
    #[command(flatten)]
    pub objects: Objects,
}

/// `-U`.
#[derive(Clone, Copy, Debug, Args)]
pub struct ForceShare {
    /// Open the image although others may be writing to it.
    #[arg(short = 'U', long = "force-share")]
    pub force_share: bool,
}

/// `-q`.
#[derive(Clone, Copy, Debug, Args)]
pub struct Quiet {
    /// Print errors only.
    #[arg(short = 'q', long = "quiet")]
    pub quiet: bool,
}

/// `create`
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Quiet.
    #[command(flatten)]
    pub quiet: Quiet,
    /// Format of the new image.
    #[arg(short = 'f', long = "format", value_name = "FMT", default_value = "raw")]
    pub format: String,
    /// Options of the format, comma separated ('help' lists them); may be given several times.
    #[arg(short = 'o', long = "options", value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Image below the new one.
    #[arg(short = 'b', long = "backing", value_name = "BACKING_FILENAME")]
    pub backing: Option<String>,
    /// Format of the image below.
    #[arg(short = 'F', long = "backing-format", value_name = "BACKING_FMT")]
    pub backing_format: Option<String>,
    /// Do not look at the image below; SIZE is needed then.
    #[arg(short = 'u', long = "backing-unsafe")]
    pub backing_unsafe: bool,
    /// Objects.
    #[command(flatten)]
    pub objects: Objects,
    /// The new image.
    #[arg(value_name = "FILENAME")]
    pub filename: Option<String>,
    /// Its size: bytes, or with a suffix of bkKMGTPE (powers of 1024). Default: that of the image below.
    #[arg(value_name = "SIZE")]
    pub size: Option<String>,
}

/// `info`
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// Image.
    #[command(flatten)]
    pub source: Source,
    /// Tell of the images below as well.
    #[arg(short = 'b', long = "backing-chain")]
    pub backing_chain: bool,
    /// Sharing.
    #[command(flatten)]
    pub share: ForceShare,
    /// How to write it.
    #[arg(long = "output", value_enum, default_value_t, value_name = "FORMAT")]
    pub output: Output,
    /// The image.
    #[arg(value_name = "FILENAME")]
    pub filename: String,
}

/// `check`
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Quiet.
    #[command(flatten)]
    pub quiet: Quiet,
    /// Image.
    #[command(flatten)]
    pub source: Source,
    /// Cache mode.
    #[arg(short = 'T', long = "cache", value_name = "CACHE_MODE", default_value = "writeback")]
    pub cache: String,
    /// Sharing.
    #[command(flatten)]
    pub share: ForceShare,
    /// How to write it.
    #[arg(long = "output", value_enum, default_value_t, value_name = "FORMAT")]
    pub output: Output,
    /// What to repair: leaks, or all.
    #[arg(short = 'r', long = "repair", value_enum, value_name = "WHAT")]
    pub repair: Option<Repair>,
    /// The image.
    #[arg(value_name = "FILENAME")]
    pub filename: String,
}

/// What `check -r` repairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Repair {
    /// Space nobody refers to.
    Leaks,
    /// Everything that can be.
    All,
}

/// `map`
#[derive(Debug, Args)]
pub struct MapArgs {
    /// Image.
    #[command(flatten)]
    pub source: Source,
    /// Sharing.
    #[command(flatten)]
    pub share: ForceShare,
    /// How to write it.
    #[arg(long = "output", value_enum, default_value_t, value_name = "FORMAT")]
    pub output: Output,
    /// Begin here.
    #[arg(short = 's', long = "start-offset", value_name = "OFFSET")]
    pub start_offset: Option<String>,
    /// Tell of no more than this.
    #[arg(short = 'l', long = "max-length", value_name = "LENGTH")]
    pub max_length: Option<String>,
    /// The image.
    #[arg(value_name = "FILENAME")]
    pub filename: String,
}

/// `snapshot`
#[derive(Debug, Args)]
pub struct SnapshotArgs {
    /// Quiet.
    #[command(flatten)]
    pub quiet: Quiet,
    /// Image.
    #[command(flatten)]
    pub source: Source,
    /// Sharing.
    #[command(flatten)]
    pub share: ForceShare,
    /// List the snapshots (the default).
    #[arg(short = 'l', long = "list")]
    pub list: bool,
    /// Set the disk back to a snapshot, given by id or name.
    #[arg(short = 'a', long = "apply", value_name = "SNAPSHOT")]
    pub apply: Option<String>,
    /// Create a snapshot of this name.
    #[arg(short = 'c', long = "create", value_name = "SNAPSHOT")]
    pub create: Option<String>,
    /// Delete the snapshot of this name.
    #[arg(short = 'd', long = "delete", value_name = "SNAPSHOT")]
    pub delete: Option<String>,
    /// The image.
    #[arg(value_name = "FILENAME")]
    pub filename: String,
}

/// `resize`
#[derive(Debug, Args)]
#[command(allow_negative_numbers = true)]
pub struct ResizeArgs {
    /// Quiet.
    #[command(flatten)]
    pub quiet: Quiet,
    /// Image.
    #[command(flatten)]
    pub source: Source,
    /// Allow the image to become smaller; what lies past its new end is lost.
    #[arg(long = "shrink")]
    pub shrink: bool,
    /// How space is set aside for what is added: off, metadata, falloc or full.
    #[arg(long = "preallocation", value_name = "MODE")]
    pub preallocation: Option<String>,
    /// The image.
    #[arg(value_name = "FILENAME")]
    pub filename: String,
    /// Its new size, or by how much to grow (+) or shrink (-) it; with a suffix of bkKMGTPE (powers of 1024).
    #[arg(value_name = "[+-]SIZE", allow_hyphen_values = true)]
    pub size: String,
}

/// `convert`
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Quiet.
    #[command(flatten)]
    pub quiet: Quiet,
    /// Show the progress: a bar on a terminal, qemu-img's percentages elsewhere.
    #[arg(short = 'p', long = "progress")]
    pub progress: bool,
    /// Format of the images that are read.
    #[arg(short = 'f', long = "source-format", value_name = "SRC_FMT")]
    pub source_format: Option<String>,
    /// SRC_FILENAME holds options as of --blockdev instead of a name.
    #[arg(long = "image-opts", visible_alias = "source-image-opts")]
    pub image_opts: bool,
    /// Read this snapshot inside the image: its id or name, or snapshot.id=ID and snapshot.name=NAME.
    #[arg(short = 'l', long = "source-snapshot", value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    /// Cache mode of the images that are read.
    #[arg(short = 'T', long = "source-cache", value_name = "CACHE_MODE", default_value = "writeback")]
    pub source_cache: String,
    /// Format of the image that is written.
    #[arg(short = 'O', long = "target-format", value_name = "TGT_FMT")]
    pub target_format: Option<String>,
    /// TGT_FILENAME holds options as of --blockdev instead of a name; needs -n.
    #[arg(long = "target-image-opts")]
    pub target_image_opts: bool,
    /// Options of the new image, comma separated ('help' lists them); may be given several times.
    #[arg(short = 'o', long = "target-options", value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Write compressed clusters.
    #[arg(short = 'c', long = "compress")]
    pub compress: bool,
    /// Cache mode of the image that is written.
    #[arg(short = 't', long = "target-cache", value_name = "CACHE_MODE", default_value = "unsafe")]
    pub target_cache: String,
    /// The new image lies on top of this one; only what differs is written.
    #[arg(short = 'B', long = "backing", value_name = "BACKING_FILENAME")]
    pub backing: Option<String>,
    /// Format of the image below the new one.
    #[arg(short = 'F', long = "backing-format", value_name = "BACKING_FMT")]
    pub backing_format: Option<String>,
    /// The target exists and is written as it is.
    #[arg(short = 'n', long = "no-create")]
    pub no_create: bool,
    /// The target of -n reads as zeroes.
    #[arg(long = "target-is-zero")]
    pub target_is_zero: bool,
    /// Shortest run of zeroes that is left out, bytes; 0 writes everything. Default: 4k.
    #[arg(short = 'S', long = "sparse-size", value_name = "SPARSE_SIZE")]
    pub sparse_size: Option<String>,
    /// Copy the persistent bitmaps too.
    #[arg(long = "bitmaps")]
    pub bitmaps: bool,
    /// Leave out bitmaps that are inconsistent.
    #[arg(long = "skip-broken-bitmaps")]
    pub skip_broken_bitmaps: bool,
    /// Sharing.
    #[command(flatten)]
    pub share: ForceShare,
    /// Most bytes a second.
    #[arg(short = 'r', long = "rate-limit", visible_alias = "rate", value_name = "RATE")]
    pub rate: Option<String>,
    /// Requests at the same time, 1 to 16.
    #[arg(short = 'm', long = "parallel", value_name = "NUM", default_value = "8")]
    pub parallel: String,
    /// Accepted and not needed: data is always read and written.
    #[arg(short = 'C', long = "copy-range-offloading")]
    pub copy_range: bool,
    /// Go on after what cannot be read; it becomes zeroes and is reported.
    #[arg(long = "salvage")]
    pub salvage: bool,
    /// Write in any order: faster, and the new image may be less sequential.
    #[arg(short = 'W', long = "oob-writes")]
    pub out_of_order: bool,
    /// Objects.
    #[command(flatten)]
    pub objects: Objects,
    /// The images to read, put one after the other, and the image to write.
    #[arg(value_name = "SRC_FILENAME... TGT_FILENAME")]
    pub filenames: Vec<String>,
}

/// `compare`
#[derive(Debug, Args)]
pub struct CompareArgs {
    /// Quiet.
    #[command(flatten)]
    pub quiet: Quiet,
    /// Show the progress: a bar on a terminal, qemu-img's percentages elsewhere.
    #[arg(short = 'p', long = "progress")]
    pub progress: bool,
    /// Format of the first image.
    #[arg(short = 'f', long = "a-format", value_name = "FMT")]
    pub format1: Option<String>,
    /// Format of the second image.
    #[arg(short = 'F', long = "b-format", value_name = "FMT")]
    pub format2: Option<String>,
    /// The names hold options as of --blockdev.
    #[arg(long = "image-opts")]
    pub image_opts: bool,
    /// Different sizes, and different allocation, make a difference.
    #[arg(short = 's', long = "strict")]
    pub strict: bool,
    /// Cache mode.
    #[arg(short = 'T', long = "cache", value_name = "CACHE_MODE", default_value = "writeback")]
    pub cache: String,
    /// Sharing.
    #[command(flatten)]
    pub share: ForceShare,
    /// Objects.
    #[command(flatten)]
    pub objects: Objects,
    /// The first image.
    #[arg(value_name = "FILENAME1")]
    pub filename1: String,
    /// The second image.
    #[arg(value_name = "FILENAME2")]
    pub filename2: String,
}

/// `measure`
#[derive(Debug, Args)]
pub struct MeasureArgs {
    /// Image.
    #[command(flatten)]
    pub source: Source,
    /// Format of the image to come.
    #[arg(short = 'O', long = "target-format", value_name = "FMT", default_value = "raw")]
    pub target_format: String,
    /// Options of the image to come.
    #[arg(short = 'o', long = "target-options", value_name = "OPTIONS")]
    pub options: Vec<String>,
    /// Measure for an empty disk of this size.
    #[arg(short = 's', long = "size", value_name = "SIZE")]
    pub size: Option<String>,
    /// Measure for this snapshot inside the image.
    #[arg(short = 'l', long = "snapshot", value_name = "SNAPSHOT")]
    pub snapshot: Option<String>,
    /// How to write it.
    #[arg(long = "output", value_enum, default_value_t, value_name = "FORMAT")]
    pub output: Output,
    /// Sharing.
    #[command(flatten)]
    pub share: ForceShare,
    /// The image to measure for.
    #[arg(value_name = "FILENAME")]
    pub filename: Option<String>,
}

/// `bitmap`
#[derive(Debug, Args)]
pub struct BitmapArgs {
    /// Image.
    #[command(flatten)]
    pub source: Source,
    /// Actions, in the order given.
    #[command(flatten)]
    pub actions: BitmapActions,
    /// Granularity of --add, bytes.
    #[arg(short = 'g', long = "granularity", value_name = "SIZE")]
    pub granularity: Option<String>,
    /// Image that holds the bitmap of --merge.
    #[arg(short = 'b', long = "source-file", value_name = "SRC_FILENAME")]
    pub source_file: Option<String>,
    /// Its format.
    #[arg(short = 'F', long = "source-format", value_name = "SRC_FMT")]
    pub source_format: Option<String>,
    /// The image.
    #[arg(value_name = "FILENAME")]
    pub filename: String,
    /// The bitmap; not with --list.
    #[arg(value_name = "BITMAP")]
    pub bitmap: Option<String>,
}

/// What `bitmap` does; which came first is asked of clap's matches.
#[derive(Debug, Args)]
pub struct BitmapActions {
    /// Create the bitmap; it records from then on.
    #[arg(long = "add")]
    pub add: bool,
    /// Remove the bitmap.
    #[arg(long = "remove")]
    pub remove: bool,
    /// Mark everything clean.
    #[arg(long = "clear")]
    pub clear: bool,
    /// Record from now on.
    #[arg(long = "enable")]
    pub enable: bool,
    /// Stop recording.
    #[arg(long = "disable")]
    pub disable: bool,
    /// Add what this bitmap holds; may be given several times.
    #[arg(long = "merge", value_name = "SOURCE_BITMAP")]
    pub merge: Vec<String>,
    /// List the bitmaps of the image.
    #[arg(long = "list")]
    pub list: bool,
}
