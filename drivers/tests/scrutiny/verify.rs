//! blkverify over images that are right and images that are not.

use graph::Errno;
use serde_json::{Value, json};

use crate::table::Table;

fn verify(raw: Value, test: Value) -> Value {
    json!({"driver": "blkverify", "raw": raw, "test": test})
}

#[test]
fn a_difference_is_an_error_and_nothing_more() {
    let mut table = Table::new();
    let mut wrong = vec![7; 64 << 10];
    wrong[5000] = 8;
    let (raw, test) = (table.file("raw", &[7; 64 << 10]), table.file("test", &wrong));
    table.open(verify(raw, test));
    assert_eq!(table.read(0, 4096), Ok(vec![7; 4096]));
    let words = table.on(|io| async move {
        let buffer = host::IoVecs::alloc(4096, 512).unwrap();
        io.read(4096, &buffer).await.unwrap_err().to_string()
    });
    assert_eq!(words, "blkverify: read offset=4096 bytes=4096 contents mismatch at offset 5000");
    // Life goes on.
    assert_eq!(table.read(8192, 512), Ok(vec![7; 512]));
    table.write(4608, vec![3; 512]).unwrap();
    assert_eq!(table.read(4096, 4096), Ok([vec![7; 512], vec![3; 512], vec![7; 3072]].concat()));
    assert_eq!(table.flush(), Ok(()));
    table.close();
    assert!(table.content("raw") == table.content("test"));
}

#[test]
fn so_is_a_request_that_only_one_of_them_takes() {
    let mut table = Table::new();
    let (raw, test) = (table.file("raw", &[7; 64 << 10]), table.file("test", &[7; 64 << 10]));
    let rules = json!([{"event": "none", "sector": 8, "errno": 28}]);
    let test = json!({"driver": "blkdebug", "image": test, "inject-error": rules});
    table.open(verify(raw, test));
    assert_eq!(table.read(0, 4096), Ok(vec![7; 4096]));
    assert_eq!(table.read(4096, 512), Err(Errno::EIO));
    assert_eq!(table.write(4096, vec![1; 512]), Err(Errno::EIO));
    // Both fail alike: then it is the answer.
    let mut table = Table::new();
    let both = ["raw", "test"].map(|name| {
        let image = table.file(name, &[7; 64 << 10]);
        json!({"driver": "blkdebug", "image": image, "inject-error": [{"event": "none", "errno": 28}]})
    });
    let [raw, test] = both;
    table.open(verify(raw, test));
    assert_eq!(table.read(0, 512), Err(Errno::ENOSPC));
    assert_eq!(table.write(0, vec![1; 512]), Err(Errno::ENOSPC));
}

#[test]
fn past_the_end_of_raw_there_are_zeroes() {
    let mut table = Table::new();
    let (raw, test) = (table.file("raw", &[0; 4096]), table.file("test", &[0; 8192]));
    table.open(verify(raw, test));
    assert_eq!(table.read(2048, 6144), Ok(vec![0; 6144]));
    table.write(2048, vec![5; 4096]).unwrap();
    assert_eq!(table.content("raw").len(), 4096);
    assert_eq!(table.read(2048, 2048), Ok(vec![5; 2048]));
    assert_eq!(table.read(4096, 2048), Err(Errno::EIO));
}
