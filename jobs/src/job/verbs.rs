//! What control clients ask of a job: cancel, pause, resume, set-speed, complete, finalize, dismiss. Words as QEMU's.
//!
//! Called through the commands. A verb that comes while the job's end is being made final waits for that, and then meets
//! the state it led to.

use std::rc::Rc;

use graph::{BlockError, Errno, Result};

use super::info::{ErrorAction, IoStatus, JobEvent, OnError};
use super::life;
use super::table::{JobStatus, Verb};
use super::work::Ending;
use super::{Group, Job};

impl Group {
    /// Waits while the members' ends are being made final.
    pub(super) async fn settled(&self) {
        loop {
            let settled = self.settled.wait();
            if !self.finalizing.get() {
                return;
            }
            settled.await;
        }
    }
}

impl Job {
    fn check(&self, verb: Verb) -> Result<()> {
        let status = self.status();
        if status == JobStatus::Null {
            return Err(BlockError::new(Errno::ENOENT, "Job not found"));
        }
        if status.accepts(verb) {
            return Ok(());
        }
        let (id, status, verb) = (&self.id, status.as_str(), verb.as_str());
        Err(BlockError::new(
            Errno::EPERM,
            format!("Job '{id}' in state '{status}' cannot accept command verb '{verb}'"),
        ))
    }

    /// Whether somebody asked it to rest.
    pub fn user_paused(&self) -> bool {
        self.state.borrow().user_paused
    }

    /// Ends it; `force` also where the job would rather end in order.
    ///
    /// # Errors
    /// Its state does not allow it.
    pub async fn cancel(self: &Rc<Self>, force: bool) -> Result<()> {
        self.group.settled().await;
        self.check(Verb::Cancel)?;
        let ready = matches!(self.status(), JobStatus::Ready | JobStatus::Standby);
        let ended = self.state.borrow().ended;
        let soft = !force && self.work.cancels_softly(ready);
        if soft && ended {
            // It has come to its end already.
            return Ok(());
        }
        self.wake_up();
        if soft {
            self.state.borrow_mut().ending.get_or_insert(Ending::Soft);
            self.control.poke();
            return Ok(());
        }
        self.force_cancel();
        if ended {
            life::member_ended(self).await;
        }
        Ok(())
    }

    /// As `block-job-cancel`: without force a job that rests is left alone.
    ///
    /// # Errors
    /// It rests, or its state does not allow it.
    pub async fn block_cancel(self: &Rc<Self>, force: bool) -> Result<()> {
        self.group.settled().await;
        if self.user_paused() && !force {
            let text = format!("The block job for device '{}' is currently paused", self.id);
            return Err(BlockError::new(Errno::EBUSY, text));
        }
        self.cancel(force).await
    }

    /// It ends as cancelled, whatever its work says.
    pub(super) fn force_cancel(&self) {
        if matches!(self.status(), JobStatus::Aborting | JobStatus::Concluded | JobStatus::Null) {
            return;
        }
        self.wake_up();
        self.state.borrow_mut().force_cancelled = true;
        self.control.cancel();
    }

    /// Ends a rest somebody asked for.
    fn wake_up(&self) {
        let was = std::mem::take(&mut self.state.borrow_mut().user_paused);
        if !was {
            return;
        }
        self.state.borrow_mut().io_status = IoStatus::Ok;
        if self.status().rests() {
            self.enter(self.status().resting(false));
        }
        self.control.resume();
    }

    /// Lets it rest: takes effect once what is in flight has ended.
    ///
    /// # Errors
    /// It rests already, or its state does not allow it.
    pub async fn pause(self: &Rc<Self>) -> Result<()> {
        self.group.settled().await;
        self.check(Verb::Pause)?;
        if self.user_paused() {
            return Err(BlockError::new(Errno::EBUSY, "Job is already paused"));
        }
        self.let_rest();
        Ok(())
    }

    fn let_rest(&self) {
        self.state.borrow_mut().user_paused = true;
        self.control.pause();
        if self.control.is_active() {
            // `life::live` watches for the moment.
            self.changed.notify_all();
        } else {
            self.rests_now();
        }
    }

    /// Nothing is in flight: it rests, if it still should.
    pub(super) fn rests_now(&self) {
        let status = self.status();
        let next = status.resting(true);
        if self.user_paused() && next != status {
            self.enter(next);
        }
    }

    /// Ends its rest.
    ///
    /// # Errors
    /// It does not rest, or its state does not allow it.
    pub async fn resume(self: &Rc<Self>) -> Result<()> {
        self.group.settled().await;
        if !self.user_paused() || self.state.borrow().ended {
            return Err(BlockError::new(Errno::EINVAL, "Can't resume a job that was not paused"));
        }
        self.check(Verb::Resume)?;
        self.wake_up();
        Ok(())
    }

    /// Limits its rate, bytes per second; 0: no limit.
    ///
    /// # Errors
    /// A negative rate, or its state does not allow it.
    pub async fn set_speed(self: &Rc<Self>, speed: i64) -> Result<()> {
        self.group.settled().await;
        self.check(Verb::SetSpeed)?;
        self.control.set_rate(check_speed(speed)?);
        Ok(())
    }

    /// Tells it to come to its end.
    ///
    /// # Errors
    /// It is not that sort of job, or its state does not allow it.
    pub async fn complete(self: &Rc<Self>) -> Result<()> {
        self.group.settled().await;
        self.check(Verb::Complete)?;
        let cancelled = self.control.cancelled() || self.ending() == Some(Ending::Soft);
        if cancelled || !self.work.completes() {
            return Err(BlockError::new(
                Errno::ENOTSUP,
                format!("The active block job '{}' cannot be completed", self.id),
            ));
        }
        self.state.borrow_mut().ending.get_or_insert(Ending::Complete);
        self.control.poke();
        Ok(())
    }

    /// Makes the changes that were held back, of all jobs of its group.
    ///
    /// # Errors
    /// Its state does not allow it.
    pub async fn finalize(self: &Rc<Self>) -> Result<()> {
        self.group.settled().await;
        self.check(Verb::Finalize)?;
        life::finalize(&self.group).await;
        Ok(())
    }

    /// Forgets it.
    ///
    /// # Errors
    /// Its state does not allow it.
    pub async fn dismiss(self: &Rc<Self>) -> Result<()> {
        self.group.settled().await;
        self.check(Verb::Dismiss)?;
        self.forget();
        Ok(())
    }

    pub(super) fn ending(&self) -> Option<Ending> {
        self.state.borrow().ending
    }

    pub(super) fn request_failed(&self, policy: OnError, read: bool, errno: Errno) -> ErrorAction {
        let nospace = errno == Errno::ENOSPC;
        let action = match policy {
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto if nospace => ErrorAction::Stop,
            OnError::Report | OnError::Enospc | OnError::Auto => ErrorAction::Report,
            OnError::Ignore => ErrorAction::Ignore,
        };
        self.emit(JobEvent::Error { device: self.id.clone(), read, action });
        if action == ErrorAction::Stop {
            if self.state.borrow().io_status == IoStatus::Ok {
                self.state.borrow_mut().io_status =
                    if nospace { IoStatus::Nospace } else { IoStatus::Failed };
            }
            if !self.user_paused() && !self.control.cancelled() {
                self.let_rest();
            }
        }
        action
    }
}

/// A rate of a control client.
///
/// # Errors
/// It is negative.
pub(super) fn check_speed(speed: i64) -> Result<u64> {
    u64::try_from(speed).map_err(|_| BlockError::invalid("Parameter 'speed' expects a non-negative value"))
}
