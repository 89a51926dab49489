//! Comparison with the storage daemon of QEMU 10.0: the same bytes to both, the same answers expected. Skipped, with a
//! line that says so, where that program is not installed.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
#![allow(dead_code)]

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::task::{Context, Waker};

use ringblk_qmp::command::{CommandTable, Commands, Version};
use ringblk_qmp::error::QmpError;
use ringblk_qmp::event::Events;
use ringblk_qmp::schema::{Member, ObjectType, SchemaBuilder, Shape, TypeRef};
use ringblk_qmp::server::{Server, SessionId};
use ringblk_qmp::session::SessionOptions;
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Value, json};

const QSD: &str = "/usr/bin/qemu-storage-daemon";

fn available() -> bool {
    let found = Path::new(QSD).exists();
    if !found {
        eprintln!("skipped: {QSD} is not installed");
    }
    found
}

// Commands of the same form as QEMU's; the handlers fail, since only what comes before them is compared.

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct BlockdevDel {
    node_name: String,
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Common {
    driver: String,
    node_name: Option<String>,
    cache: Option<Cache>,
    read_only: Option<bool>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct Cache {
    direct: Option<bool>,
    no_flush: Option<bool>,
}

#[derive(Deserialize, JsonSchema)]
struct FileOptions {
    filename: String,
    aio: Option<Aio>,
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
enum Aio {
    Threads,
    Native,
    IoUring,
}

#[derive(Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
struct NullOptions {
    size: Option<i64>,
    latency_ns: Option<u64>,
    read_zeroes: Option<bool>,
}

fn blockdev_options(b: &mut SchemaBuilder) -> TypeRef {
    let (string, int) = (b.string(), b.int());
    let options = b.named("BlockdevOptions");
    let child = b.alternate("BlockdevRef", "", vec![options, string]);
    let base = b.object_from::<Common>();
    let variants = vec![
        ("file".to_owned(), b.object_from::<FileOptions>(), String::new()),
        ("null-co".to_owned(), b.object_from::<NullOptions>(), String::new()),
        ("raw".to_owned(), raw(b, child, int), String::new()),
        ("quorum".to_owned(), quorum(b, child, int), String::new()),
    ];
    b.union("BlockdevOptions", "", "driver", base, variants)
}

fn reopen(b: &mut SchemaBuilder) -> TypeRef {
    let options = blockdev_options(b);
    let list = b.array(options);
    object(b, "Reopen", vec![("options", list, false)])
}

fn table() -> Rc<CommandTable<()>> {
    let mut commands = Commands::new(Version::default(), |()| {});
    commands
        .register("blockdev-del", "", |(), _: BlockdevDel| async { Err::<(), _>(QmpError::generic("ran")) });
    let ran = |(), _| std::future::ready(Err(QmpError::generic("ran")));
    commands.register_value("blockdev-add", "", blockdev_options, SchemaBuilder::empty, ran);
    commands.register_value("blockdev-reopen", "", reopen, SchemaBuilder::empty, ran);
    let table = commands.finish();
    assert_eq!(table.schema().problems(), &[] as &[String]);
    table
}

fn object(b: &mut SchemaBuilder, name: &str, members: Vec<(&str, TypeRef, bool)>) -> TypeRef {
    let members = members
        .into_iter()
        .map(|(name, ty, optional)| Member {
            name: name.into(),
            ty,
            optional,
            default: None,
            doc: String::new(),
        })
        .collect();
    b.define(name, "", Shape::Object(ObjectType { members, union: None }))
}

fn raw(b: &mut SchemaBuilder, child: TypeRef, int: TypeRef) -> TypeRef {
    object(b, "Raw", vec![("file", child, false), ("offset", int, true), ("size", int, true)])
}

fn quorum(b: &mut SchemaBuilder, child: TypeRef, int: TypeRef) -> TypeRef {
    let children = b.array(child);
    object(b, "Quorum", vec![("children", children, false), ("vote-threshold", int, false)])
}

/// Ours, without sockets.
struct Ours {
    server: Server<()>,
    id: SessionId,
}

impl Ours {
    fn start() -> Self {
        let mut server = Server::new(table(), (), Events::new());
        let id = server.connect(SessionOptions::default()).unwrap();
        Ours { server, id }
    }

    fn exchange(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut out = Vec::new();
        for chunk in bytes.chunks(7) {
            self.server.session(self.id).unwrap().receive(chunk);
            self.server.poll(&mut Context::from_waker(Waker::noop()));
            let session = self.server.session(self.id).unwrap();
            out.extend_from_slice(session.output());
            session.consume(out.len());
        }
        out
    }
}

/// Theirs.
struct Theirs {
    child: Child,
    stream: UnixStream,
    _dir: tempfile::TempDir,
}

impl Theirs {
    fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("q");
        let chardev = format!("socket,path={},server=on,wait=off,id=c", path.display());
        let mut child = Command::new(QSD)
            .args(["--chardev", &chardev, "--monitor", "chardev=c"])
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let stream = loop {
            match UnixStream::connect(&path) {
                Ok(stream) => break stream,
                Err(_) => assert!(child.try_wait().unwrap().is_none(), "it ended"),
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        };
        Theirs { child, stream, _dir: dir }
    }

    /// Sends, and reads up to the answer to the last request, which carries `mark` as its id.
    fn exchange(&mut self, bytes: &[u8], mark: &str) -> Vec<u8> {
        self.stream.write_all(bytes).unwrap();
        let mut out = Vec::new();
        let mut chunk = [0; 65536];
        while !String::from_utf8_lossy(&out).contains(mark) || !out.ends_with(b"\n") {
            let n = self.stream.read(&mut chunk).unwrap();
            assert_ne!(n, 0, "it hung up");
            out.extend_from_slice(&chunk[..n]);
        }
        out
    }
}

impl Drop for Theirs {
    fn drop(&mut self) {
        // It may have ended by itself.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Answers without what may differ: the version, the order of members.
fn answers(bytes: &[u8]) -> Vec<Value> {
    String::from_utf8_lossy(bytes)
        .lines()
        .map(|line| {
            let mut message: Value = serde_json::from_str(line).unwrap_or_else(|e| panic!("{e}: {line}"));
            for key in ["QMP", "return"] {
                if message.get(key).is_some_and(|v| v.get("package").is_some() || key == "QMP") {
                    message[key] = json!("version");
                }
            }
            message
        })
        .collect()
}

#[test]
fn sessions_answer_alike() {
    if !available() {
        return;
    }
    let (mut ours, mut theirs) = (Ours::start(), Theirs::start());
    let scripts: &[&[u8]] = &[
        // before the negotiation
        b"{\"execute\":\"query-version\"}",
        b"{\"execute\":\"foo\", \"id\": null}",
        b"{\"execute\":\"qmp_capabilities\",\"arguments\":{\"foo\":1}}",
        b"{\"exec-oob\":\"qmp_capabilities\"}",
        b"[1]",
        b"{\"execute\":\"qmp_capabilities\",\"id\":{\"a\":[1,null]}}",
        // after it
        b"{\"execute\":\"qmp_capabilities\"}",
        b"{\"execute\":\"query-version\"}{\"execute\":\"query-version\",\"id\":1}",
        b"{\"execute\":\"foo\",\"id\":\"x\"}",
        b"{\"exec-oob\":\"query-version\",\"id\":\"x\"}",
        b"null \"abc\" 1 {}",
        b"{\"execute\":1}",
        b"{\"id\":5}",
        b"{\"execute\":\"query-version\",\"foo\":1,\"id\":9}",
        b"{\"execute\":\"query-version\",\"arguments\":[]}",
        b"{\"execute\":\"query-version\",\"arguments\":null}",
        b"{\"execute\":\"query-version\",\"arguments\":{\"a\":1}}",
        b"{'execute':'query-version', 'id':'a\\'b'}",
        b"{\"execute\":\"query-version\", \"id\":%d}",
        b"{\"execute\":\"query-version\", \"id\":\"%d\"}",
        b"{\"execute\":\"query-version\", \"id\":18446744073709551615}",
        b"{\"execute\":\"query-version\", \"id\":18446744073709551616}",
        b"{\"execute\":\"query-version\", \"id\":\"\\u00e9\xc3\xa9\\/\\n\\ud834\\udd1e\"}",
        b"{\"execute\":\"query-version\", \"id\":\"\x01\"}",
        b"{\"execute\":\"query-version\", \"id\":1,\"id\":2}",
        b"{\"execute\" \"query-version\"}",
        b"{\"execute\":\"query-version\",}",
        b"{\"execute\":\"query-version\" \xff",
        b"{\"execute\":\"query-version\", \"id\": \"abc \xff",
        b"}",
        b"{]",
        b"[}",
        b"{\"a\":1]",
        b"{\"a\":}",
        b"foo @",
        b"\"unterminated\n\"",
        b"{\"execute\":\"query-\xff\"}",
        b"{\"execute\":\"query-\xc0\xaf\"}",
        b"{\"execute\":\"query-version\"} @ {\"execute\":\"query-version\"}",
        b"{\"execute\": 01}",
        b"{\"execute\": tru}",
        b"{\"execute\": \"\\x\"}",
        b"{1:2}",
        b"[1,]",
        b"[1 2]",
        b"-\n",
        b"-a 1\n",
        b"1e5x\n",
        b"0x10\n",
        b"%abc\t1 \n1 ",
        b"%abc\x01 1 ",
        b"%abc\xfe1 ",
        b"\"\\ud800\" ",
        b"\"\\u12\" ",
        b"\"\\u12G4\" ",
        b"\x1b",
        b"\x7f",
        b"\xc3\xa9",
        b"\x0c",
        // arguments
        b"{\"execute\":\"blockdev-del\"}",
        b"{\"execute\":\"blockdev-del\",\"arguments\":{\"node-name\":1}}",
        b"{\"execute\":\"blockdev-del\",\"arguments\":{\"node-name\":\"a\",\"x\":1}}",
        b"{\"execute\":\"blockdev-add\",\"arguments\":{}}",
        b"{\"execute\":\"blockdev-add\",\"arguments\":{\"driver\":\"foo\"}}",
        b"{\"execute\":\"blockdev-add\",\"arguments\":{\"driver\":1}}",
        b"{\"execute\":\"blockdev-add\",\"arguments\":{\"driver\":\"file\",\"node-name\":\"a\",\"filename\":\"x\",\
          \"cache\":{\"direct\":\"on\"}}}",
        b"{\"execute\":\"blockdev-add\",\"arguments\":{\"driver\":\"file\",\"node-name\":\"a\",\"filename\":\"x\",\
          \"cache\":{\"foo\":true}}}",
        b"{\"execute\":\"blockdev-add\",\"arguments\":{\"driver\":\"file\",\"filename\":\"x\",\"read-only\":null}}",
        b"{\"execute\":\"blockdev-add\",\"arguments\":{\"driver\":\"raw\",\"node-name\":\"a\",\"file\":1}}",
        b"{\"execute\":\"blockdev-add\",\"arguments\":{\"driver\":\"raw\",\"node-name\":\"a\",\"file\":null}}",
        b"{\"execute\":\"blockdev-add\",\"arguments\":{\"driver\":\"raw\",\"file\":\"x\",\"size\":1.5}}",
        b"{\"execute\":\"blockdev-add\",\"arguments\":{\"driver\":\"raw\",\"file\":\"x\",\"size\":\"1\"}}",
        b"{\"execute\":\"blockdev-add\",\"arguments\":{\"driver\":\"raw\",\"file\":\"x\",\"size\":18446744073709551615}}",
        b"{\"execute\":\"blockdev-add\",\"arguments\":{\"driver\":\"raw\",\"file\":{\"driver\":\"file\"}}}",
        b"{\"execute\":\"blockdev-add\",\"arguments\":{\"driver\":\"raw\",\"file\":{\"driver\":\"raw\",\
          \"file\":{\"driver\":\"file\",\"filename\":\"x\",\"bar\":1}}}}",
        b"{\"execute\":\"blockdev-reopen\",\"arguments\":{\"options\":{}}}",
        b"{\"execute\":\"blockdev-reopen\",\"arguments\":{\"options\":[{\"driver\":\"file\",\"node-name\":1}]}}",
        b"{\"execute\":\"blockdev-reopen\",\"arguments\":{\"options\":[{\"driver\":\"file\",\"filename\":\"x\",\"y\":1}]}}",
    ];
    for (index, script) in scripts.iter().enumerate() {
        // A line end ends what a lexical error began; the mark says that the answers are complete.
        let mark = format!("mark-{index}-");
        let mut bytes = script.to_vec();
        bytes.extend_from_slice(format!("\n{{\"execute\":\"query-version\",\"id\":\"{mark}\"}}").as_bytes());
        let expected = answers(&theirs.exchange(&bytes, &mark));
        let got = answers(&ours.exchange(&bytes));
        // Each is told its own: QEMU offers oob.
        assert_eq!(got, expected, "{}", String::from_utf8_lossy(script));
    }
}

#[test]
fn options_of_the_command_line_fail_alike() {
    if !available() {
        return;
    }
    let texts = [
        "null-co,size=x",
        "null-co,node-name=a,size=1x",
        "null-co,node-name=a,size=0x10k",
        "null-co,node-name=a,read-zeroes=1",
        "null-co,node-name=a,read-zeroes=Y",
        "null-co,node-name=a,read-zeroes=n,zz=1",
        "null-co,node-name=a,read-zeroes=yes,zz=1",
        "null-co,node-name=a,read-zeroes",
        "null-co,latency-ns=0x10,node-name=a,zz=1",
        "null-co,latency-ns=1k,node-name=a",
        "=x",
        ",",
        "",
        "a",
        "help",
        "null-co,help",
        "null-co,a..b=1",
        "null-co,.a=1",
        "null-co,node-name=a,node-name.b=1",
        "null-co,node-name.b=1,node-name=a",
        "null-co,node-name.0=1,node-name.2=2",
        "null-co,node-name.0=1,node-name.x=2",
        "null-co,node-name=a,1a=2",
        "null-co,node-name=a,a b=2",
        "null-co,node-name=a,_x=1",
        "null-co,node-name=a,__com.x_y=1",
        "null-co,node-name=a,cache=x",
        "null-co,node-name=a,cache.0=x",
        "file,filename=/nonexist,cache.direct=q,node-name=x",
        "file,filename=/nonexist,cache.foo=on,node-name=x",
        "raw,file.driver=file,file.filename=/nx,file.zz=1,node-name=x",
        "raw,node-name=x",
        "raw,node-name=x,file.driver=file",
        "foo,node-name=x",
        "{\"driver\":\"null-co\"",
        "{\"driver\":\"null-co\",\"size\":\"1\"}",
        "[1]",
        "quorum,children.0=a,children.1=b,vote-threshold=1.5,node-name=x",
        "quorum,children=a,vote-threshold=1,node-name=x",
        "quorum,children.1000000=a,node-name=x,vote-threshold=1",
    ];
    let table = table();
    for text in texts {
        let output = Command::new(QSD).args(["--blockdev", text]).stdin(Stdio::null()).output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        let prefix = format!("qemu-storage-daemon: --blockdev {text}: ");
        let expected = stderr.trim_end().strip_prefix(&prefix).unwrap_or_else(|| panic!("{text}: {stderr}"));
        let got = table.call_option((), "blockdev-add", text, "driver").err().map(|e| e.desc);
        assert_eq!(got.as_deref(), Some(expected), "{text}");
    }
}
