//! Counting votes: which content, or which error, most children have. Pure.
//!
//! Called by `io`. Must not know children.

use graph::Errno;
use host::IoVecs;

/// The outcome of a vote on contents.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Outcome {
    /// Index of the first buffer with the content that won.
    pub(super) winner: usize,
    /// How many have it.
    pub(super) votes: usize,
    /// Indexes of those that have another one.
    pub(super) losers: Vec<usize>,
}

/// Which content most buffers have; the first one's of several with the same number. `None` without buffers.
pub(super) fn vote(buffers: &[&IoVecs]) -> Option<Outcome> {
    // Each buffer is compared with one of each version seen so far: once per buffer when all agree.
    let mut versions: Vec<(usize, Vec<usize>)> = Vec::new();
    for (i, buffer) in buffers.iter().enumerate() {
        let same = |first: &IoVecs| first.len() == buffer.len() && first.first_difference(buffer).is_none();
        match versions.iter_mut().find(|(first, _)| buffers.get(*first).is_some_and(|f| same(f))) {
            Some((_, voters)) => voters.push(i),
            None => versions.push((i, vec![i])),
        }
    }
    let most = versions.iter().map(|(_, voters)| voters.len()).max()?;
    let (winner, voters) = versions.into_iter().find(|(_, voters)| voters.len() == most)?;
    let losers = (0..buffers.len()).filter(|i| !voters.contains(i)).collect();
    Some(Outcome { winner, votes: most, losers })
}

/// The error most children had; the first one of several with the same number.
pub(super) fn vote_errors(errors: &[Errno]) -> Errno {
    let count = |e: &Errno| errors.iter().filter(|other| *other == e).count();
    let most = errors.iter().map(count).max().unwrap_or(0);
    errors.iter().find(|e| count(e) == most).copied().unwrap_or(Errno::EIO)
}
