//! A queue between threads: a lock and a condition, which ask the kernel for nothing but `futex`. The channels of the
//! standard library also yield the processor, when two threads meet in them; a call that only bad luck makes has no
//! place in the jail's table (`jail::table`), since no test could show the need for it.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
};

struct Shared<T> {
    state: Mutex<State<T>>,
    came: Condvar,
}

struct State<T> {
    letters: VecDeque<T>,
    senders: usize,
    /// Somebody may still take letters out.
    has_receiver: bool,
    /// The receiver waits for the next.
    sleeps: bool,
}

impl<T> Shared<T> {
    fn state(&self) -> MutexGuard<'_, State<T>> {
        // No code of others runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wake(&self, state: &mut State<T>) {
        if std::mem::take(&mut state.sleeps) {
            self.came.notify_one();
        }
    }
}

/// The end that letters are put in at.
pub struct Sender<T>(Arc<Shared<T>>);

/// The end that letters are taken out at.
pub struct Receiver<T>(Arc<Shared<T>>);

/// Nobody will ever take the letter out.
#[derive(Debug)]
pub struct Closed;

/// An empty one. How many letters may wait in it is for those to bound who send them.
pub fn mailbox<T>() -> (Sender<T>, Receiver<T>) {
    let state = State { letters: VecDeque::new(), senders: 1, has_receiver: true, sleeps: false };
    let shared = Arc::new(Shared { state: Mutex::new(state), came: Condvar::new() });
    (Sender(shared.clone()), Receiver(shared))
}

impl<T> Sender<T> {
    /// Puts a letter in.
    pub fn send(&self, letter: T) -> Result<(), Closed> {
        let mut state = self.0.state();
        if !state.has_receiver {
            return Err(Closed);
        }
        state.letters.push_back(letter);
        self.0.wake(&mut state);
        Ok(())
    }
}

impl<T> Clone for Sender<T> {
    fn clone(&self) -> Self {
        self.0.state().senders += 1;
        Self(self.0.clone())
    }
}

impl<T> Drop for Sender<T> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.senders -= 1;
        if state.senders == 0 {
            self.0.wake(&mut state);
        }
    }
}

impl<T> Receiver<T> {
    /// Takes the next letter out, and waits for it; `None` if there is none and nobody is left to send one.
    pub fn recv(&self) -> Option<T> {
        let mut state = self.0.state();
        loop {
            if let Some(letter) = state.letters.pop_front() {
                return Some(letter);
            }
            if state.senders == 0 {
                return None;
            }
            state.sleeps = true;
            state = self.0.came.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Takes the next letter out, if there is one.
    pub fn try_recv(&self) -> Option<T> {
        self.0.state().letters.pop_front()
    }
}

impl<T> Drop for Receiver<T> {
    fn drop(&mut self) {
        let mut state = self.0.state();
        state.has_receiver = false;
        let letters = std::mem::take(&mut state.letters);
        drop(state);
        // Not under the lock: a letter may hold the sender of another mailbox.
        drop(letters);
    }
}

impl<T> fmt::Debug for Sender<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Sender").finish_non_exhaustive()
    }
}

impl<T> fmt::Debug for Receiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Receiver").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::{thread, time::Duration};

    use super::*;

    #[test]
    fn letters_of_many_threads_arrive_once_and_in_each_thread_s_order() {
        const LETTERS: u32 = 2000;
        let (sender, receiver) = mailbox();
        let threads: Vec<_> = (0..4)
            .map(|name| {
                let sender = sender.clone();
                thread::spawn(move || (0..LETTERS).for_each(|n| sender.send((name, n)).unwrap()))
            })
            .collect();
        drop(sender);
        let mut next = [0; 4];
        while let Some((name, n)) = receiver.recv() {
            assert_eq!(n, next[name]);
            next[name] += 1;
        }
        assert_eq!(next, [LETTERS; 4]);
        threads.into_iter().for_each(|thread| thread.join().unwrap());
    }

    #[test]
    fn receiver_that_waits_is_woken_by_a_letter_and_by_the_last_sender_s_end() {
        let (sender, receiver) = mailbox();
        let waiting = thread::spawn(move || (receiver.recv(), receiver.recv()));
        thread::sleep(Duration::from_millis(20));
        sender.send(1).unwrap();
        thread::sleep(Duration::from_millis(20));
        drop(sender);
        assert_eq!(waiting.join().unwrap(), (Some(1), None));
    }

    #[test]
    fn letters_that_nobody_takes_are_dropped_with_the_receiver() {
        let (sender, receiver) = mailbox();
        // As a device's stop: the sender of the answer is in the letter.
        let (answer, answered) = mailbox::<()>();
        sender.send(answer).unwrap();
        drop(receiver);
        assert_eq!(answered.recv(), None);
        assert!(sender.send(mailbox().0).is_err());
    }

    #[test]
    fn try_recv_of_an_empty_mailbox_does_not_wait() {
        let (sender, receiver) = mailbox();
        assert_eq!(receiver.try_recv(), None);
        sender.send(7).unwrap();
        assert_eq!(receiver.try_recv(), Some(7));
    }
}
