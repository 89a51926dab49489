//! Secrets in every form; what is wrong with one is said without repeating it.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use graph::{Secret, Secrets};
use host::exec::block_on;
use serde_json::{Value, json};

use super::{MAX_LEN, SecretProperties, load};

/// 32 bytes, to encrypt others with.
const KEY: &str = "01234567890123456789012345678901";
const IV: &str = "AAECAwQFBgcICQoLDA0ODw==";
/// "correct horse battery", encrypted with both by another implementation.
const CODED: &str = "Xwk7LfkgYzYGDssIbPpfhh8RcePTfIzOefrk23OQ1dc=";

fn parsed(mut properties: Value) -> SecretProperties {
    properties["id"] = json!("s");
    serde_json::from_value(properties).unwrap()
}

fn loaded(properties: Value) -> Result<Vec<u8>, String> {
    let secrets = Secrets::default();
    secrets.add("k", Secret::new(KEY.into())).unwrap();
    secrets.add("short", Secret::new(b"abc".to_vec())).unwrap();
    let secret = block_on(load(&parsed(properties), &secrets)).map_err(|e| e.desc)?;
    Ok(secret.bytes().to_vec())
}

fn refused(properties: Value) -> String {
    loaded(properties).unwrap_err()
}

#[test]
fn a_secret_is_what_was_given() {
    assert_eq!(loaded(json!({"data": "abc"})).unwrap(), b"abc");
    assert_eq!(loaded(json!({"data": ""})).unwrap(), b"");
    assert_eq!(loaded(json!({"data": "YWJj", "format": "base64"})).unwrap(), b"abc");
    assert_eq!(loaded(json!({"data": "/+8=", "format": "base64"})).unwrap(), [0xff, 0xef]);
    assert_eq!(loaded(json!({"data": "YW\nJjZA==\r\n", "format": "base64"})).unwrap(), b"abcd");
    // Without `keyid` the IV means nothing.
    assert_eq!(loaded(json!({"data": "abc", "iv": "x"})).unwrap(), b"abc");
}

#[test]
fn a_file_is_read_to_the_last_byte_and_no_further_than_the_limit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("secret");
    let file = || json!({"file": path.to_str().unwrap()});
    std::fs::write(&path, [0, 255, b'\n']).unwrap();
    assert_eq!(loaded(file()).unwrap(), [0, 255, b'\n']);
    std::fs::write(&path, vec![7; MAX_LEN]).unwrap();
    assert_eq!(loaded(file()).unwrap().len(), MAX_LEN);
    std::fs::write(&path, vec![7; MAX_LEN + 1]).unwrap();
    assert_eq!(refused(file()), "a secret must not exceed 65536 bytes");
    assert_eq!(refused(json!({"data": "x".repeat(MAX_LEN + 1)})), "a secret must not exceed 65536 bytes");
    std::fs::remove_file(&path).unwrap();
    assert!(refused(file()).starts_with(&format!("Unable to read {}", path.display())));
}

#[test]
fn a_secret_may_be_encrypted_with_another() {
    let coded = || json!({"data": CODED, "format": "base64", "keyid": "k", "iv": IV});
    assert_eq!(loaded(coded()).unwrap(), b"correct horse battery");
    let with = |name: &str, value: &str| {
        let mut properties = coded();
        properties[name] = json!(value);
        refused(properties)
    };
    assert_eq!(with("keyid", "nobody"), "No secret with id 'nobody'");
    assert_eq!(with("keyid", "short"), "Key should be 32 bytes in length");
    assert_eq!(with("iv", "AAAA"), "IV should be 16 bytes in length not 3");
    assert_eq!(with("format", "raw"), "Length 44 must be a multiple of block size 16");
    assert_eq!(with("data", ""), "Length 0 must be a multiple of block size 16");
    // Another IV changes the first block alone; another last block makes nonsense of the padding.
    let error = with("data", "Xwk7LfkgYzYGDssIbPpfhg==");
    assert!(error.starts_with("Incorrect number of padding bytes"), "{error}");
    let mut without = coded();
    without.as_object_mut().unwrap().remove("iv");
    assert_eq!(refused(without), "IV is required to decrypt secret");
}

#[test]
fn what_is_wrong_is_said_in_qemus_words() {
    assert_eq!(refused(json!({})), "Either 'file' or 'data' must be provided");
    assert_eq!(refused(json!({"data": "a", "file": "/x"})), "'file' and 'data' are mutually exclusive");
    let invalid = "Base64 data contains invalid characters";
    for text in ["a?bc", "====", "a===", "YQ==YQ==", "YQ=a", "YWJj=", "=YWJ"] {
        assert_eq!(refused(json!({"data": text, "format": "base64"})), invalid, "{text}");
    }
    for text in ["YWJ", "YQ=", "YWJjZ"] {
        let error = refused(json!({"data": text, "format": "base64"}));
        assert_eq!(error, "Base64 data is incomplete", "{text}");
    }
}

#[test]
fn nothing_shows_a_secret() {
    let properties = parsed(json!({"data": "hunter2"}));
    assert!(!format!("{properties:?}").contains("hunter2"));
}
