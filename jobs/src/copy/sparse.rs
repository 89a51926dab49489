//! Where data has runs of zeroes that are worth leaving out.
//!
//! Pure; called by the lanes on every range that was read. A run counts if it is at least as long as asked for and covers
//! whole granules, so that what is written stays aligned.

use host::IoVecs;

/// A part of a buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Span {
    /// From the start of the buffer, bytes.
    pub(super) at: usize,
    /// Bytes.
    pub(super) len: usize,
    /// All zero.
    pub(super) zero: bool,
}

/// Cuts `data`, which lies at `offset` of the target, into spans of data and zeroes. Zero spans are at least `min` long and
/// begin and end at multiples of `granule` (of the target's offsets) or at the ends of the buffer.
pub(super) fn spans(data: &IoVecs, offset: u64, min: usize, granule: usize) -> Vec<Span> {
    let granule = granule.max(512) as u64;
    let mut spans: Vec<Span> = Vec::new();
    let mut at = 0;
    while at < data.len() {
        let here = offset + at as u64;
        let len = ((granule - here % granule) as usize).min(data.len() - at);
        let zero = data.slice(at, len).is_zero();
        match spans.last_mut() {
            Some(last) if last.zero == zero => last.len += len,
            _ => spans.push(Span { at, len, zero }),
        }
        at += len;
    }
    merge_short(spans, min)
}

/// Zero runs below `min` are data, together with what is around them.
fn merge_short(spans: Vec<Span>, min: usize) -> Vec<Span> {
    let whole = spans.len() == 1;
    let mut out: Vec<Span> = Vec::with_capacity(spans.len());
    for mut span in spans {
        // A buffer that is zero from end to end may be part of a longer run.
        span.zero &= span.len >= min || whole;
        match out.last_mut() {
            Some(last) if last.zero == span.zero => last.len += span.len,
            _ => out.push(span),
        }
    }
    out
}
