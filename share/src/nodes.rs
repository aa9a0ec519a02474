//! The files that the guest knows: each has a number, and is kept open as a place (`O_PATH`) until the guest forgets
//! it. So a number stays that very file, whatever happens to its name.

use std::{collections::HashMap, ops::Range, os::fd::OwnedFd, sync::Arc};

use rustix::fs::FileType;

/// What tells files apart. The share is part of it, since the same file may be read-only in one and not in another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Key {
    /// Number of the share it was reached by.
    pub share: usize,
    /// Device.
    pub device: u64,
    /// Inode.
    pub inode: u64,
}

/// One file.
#[derive(Debug)]
pub struct Node {
    /// A place; cannot be read or written.
    pub place: OwnedFd,
    /// What it is; that never changes.
    pub kind: FileType,
    /// Which file it is.
    pub key: Key,
}

#[derive(Debug)]
struct Known {
    node: Arc<Node>,
    /// How often the guest was told of it, less what it has forgotten.
    lookups: u64,
}

/// All of them.
#[derive(Debug)]
pub struct Nodes {
    by_id: HashMap<u64, Known>,
    ids: HashMap<Key, u64>,
    /// Never used before, so that a stale number of the guest means no other file.
    next: u64,
}

impl Nodes {
    /// None; `first` is the first number given.
    pub fn new(first: u64) -> Self {
        Self { by_id: HashMap::new(), ids: HashMap::new(), next: first }
    }

    /// The file of this number.
    pub fn get(&self, id: u64) -> Option<Arc<Node>> {
        self.by_id.get(&id).map(|known| known.node.clone())
    }

    /// The number of this file, which the guest is told once more.
    pub fn tell(&mut self, node: Node) -> u64 {
        if let Some(id) = self.ids.get(&node.key)
            && let Some(known) = self.by_id.get_mut(id)
        {
            known.lookups = known.lookups.saturating_add(1);
            return *id;
        }
        let id = self.next;
        self.next += 1;
        self.ids.insert(node.key, id);
        self.by_id.insert(id, Known { node: Arc::new(node), lookups: 1 });
        id
    }

    /// The guest gives back `count` of the times it was told.
    pub fn forget(&mut self, id: u64, count: u64) {
        let Some(known) = self.by_id.get_mut(&id) else { return };
        known.lookups = known.lookups.saturating_sub(count);
        if known.lookups == 0 {
            self.ids.remove(&known.node.key);
            self.by_id.remove(&id);
        }
    }

    /// Forgets all that was reached by these shares; the guest still knows their numbers, which mean nothing from then on.
    pub fn forget_shares(&mut self, shares: &Range<usize>) {
        self.by_id.retain(|_, known| !shares.contains(&known.node.key.share));
        self.ids.retain(|key, _| !shares.contains(&key.share));
    }

    /// Forgets all; numbers go on.
    pub fn clear(&mut self) {
        self.by_id.clear();
        self.ids.clear();
    }

    /// How many there are.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        assert_eq!(self.by_id.len(), self.ids.len());
        self.by_id.len()
    }
}
