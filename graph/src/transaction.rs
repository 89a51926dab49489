//! A list of prepared steps that are all committed or all taken back.
//!
//! Used by `control` for every change of the graph. Each step was carried out provisionally when it was added; `commit` makes
//! it final, `abort` undoes it. Must not know what the steps do.

/// One prepared step over a context `C`. Dropping it after `commit` or `abort` is its clean-up.
pub(crate) trait Step<C> {
    /// Makes the step final. Cannot fail.
    fn commit(&mut self, context: &mut C);
    /// Undoes the step. Cannot fail. Steps are undone last first, so that each finds what it left behind.
    fn abort(&mut self, context: &mut C);
}

/// Steps in the order they were prepared.
pub(crate) struct Transaction<C> {
    steps: Vec<Box<dyn Step<C>>>,
}

impl<C> Transaction<C> {
    pub(crate) fn new() -> Transaction<C> {
        Transaction { steps: Vec::new() }
    }

    pub(crate) fn add(&mut self, step: impl Step<C> + 'static) {
        self.steps.push(Box::new(step));
    }

    /// Commits in the order of preparation, then cleans up.
    pub(crate) fn commit(mut self, context: &mut C) {
        self.steps.iter_mut().for_each(|s| s.commit(context));
    }

    /// Undoes the last step first, then cleans up.
    pub(crate) fn abort(mut self, context: &mut C) {
        self.steps.iter_mut().rev().for_each(|s| s.abort(context));
    }

    /// Commits or aborts depending on `result`, and hands the result on.
    pub(crate) fn finish<T, E>(self, context: &mut C, result: Result<T, E>) -> Result<T, E> {
        match result {
            Ok(_) => self.commit(context),
            Err(_) => self.abort(context),
        }
        result
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    struct Note(u8);
    impl Step<Vec<String>> for Note {
        fn commit(&mut self, log: &mut Vec<String>) {
            log.push(format!("c{}", self.0));
        }
        fn abort(&mut self, log: &mut Vec<String>) {
            log.push(format!("a{}", self.0));
        }
    }

    fn two() -> Transaction<Vec<String>> {
        let mut t = Transaction::new();
        t.add(Note(1));
        t.add(Note(2));
        t
    }

    #[test]
    fn commits_in_order_and_aborts_in_reverse() {
        let mut log = Vec::new();
        assert_eq!(two().finish::<_, ()>(&mut log, Ok(7)), Ok(7));
        assert_eq!(two().finish::<(), _>(&mut log, Err(8)), Err(8));
        assert_eq!(log, ["c1", "c2", "a2", "a1"]);
    }
}
