//! Applies a layer's entries, one after the other, to a tree. The rules are in the parent module's documentation.

use std::collections::HashSet;

use super::marks;
use super::path::{self, PathProblem, Target};
use super::walk;
use crate::erofs::{EncodedXattrs, FileData, XattrProblem};
use crate::tar::{Timestamp, Xattr};
use crate::tree::{Attributes, Body, Node, NodeId, Tree, XattrSet};

const OPAQUE: (&[u8], &[u8]) = (marks::OPAQUE, b"y");
const IMPLIED: (&[u8], &[u8]) = (marks::IMPLIED, b"y");
const HAS_LINKS: (&[u8], &[u8]) = (marks::HAS_LINKS, b"y");

/// Attributes of a directory that has no entry, and of a whiteout.
pub(crate) const IMPLIED_ATTRIBUTES: Attributes =
    Attributes { mode: 0o755, uid: 0, gid: 0, mtime: Timestamp { seconds: 0, nanoseconds: 0 }, xattrs: None };

/// Why an entry cannot be applied.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EntryProblem {
    #[error(transparent)]
    Path(#[from] PathProblem),
    #[error("the path goes through something that is not a directory")]
    NotADirectory,
    #[error("the path goes through too many symbolic links")]
    LinkLoop,
    #[error("the layer sends too many of its paths through symbolic links")]
    LinkSteps,
    #[error("only a directory can be the image's root")]
    RootReplaced,
    #[error("it is a hard link to {0}, which is a directory")]
    LinkTarget(String),
    #[error("its link target is empty")]
    EmptyTarget,
    #[error("its link target is longer than 4095 bytes")]
    TargetTooLong,
    #[error("its device number {0}:{1} does not exist on Linux")]
    Device(u32, u32),
    #[error("its extended attribute {0} cannot be stored: {1}")]
    Xattr(String, &'static str),
}

/// A layer in the making.
pub(super) struct LayerBuilder {
    tree: Tree,
    /// Directories without an entry, so far.
    implied: HashSet<NodeId>,
    opaque: HashSet<NodeId>,
    whiteouts: Vec<(NodeId, Box<[u8]>)>,
    link_steps: u64,
    /// Some hard link leads to a file of a lower layer.
    has_links: bool,
}

impl LayerBuilder {
    pub(super) fn new() -> Self {
        LayerBuilder {
            tree: Tree::new(IMPLIED_ATTRIBUTES),
            implied: HashSet::from([Tree::ROOT]),
            opaque: HashSet::new(),
            whiteouts: Vec::new(),
            link_steps: 0,
            has_links: false,
        }
    }

    /// An estimate of the memory taken.
    pub(super) fn bytes(&self) -> u64 {
        let whiteouts: u64 = 64 * self.whiteouts.len() as u64;
        self.tree.bytes() + whiteouts + 16 * (self.implied.len() + self.opaque.len()) as u64
    }

    /// Encodes an entry's extended attributes, without those that are dropped.
    pub(super) fn encode_xattrs(
        &mut self,
        mut xattrs: Vec<Xattr>,
        allow_user: bool,
    ) -> Result<Option<XattrSet>, EntryProblem> {
        xattrs.retain(|(name, _)| {
            let steers_overlay = name.starts_with(b"trusted.overlay.") || name.starts_with(b"user.overlay.");
            !steers_overlay && (allow_user || !name.starts_with(b"user."))
        });
        let mut kept = Vec::new();
        for xattr in xattrs {
            match EncodedXattrs::encode(std::slice::from_ref(&xattr)) {
                Ok(_) => kept.push(xattr),
                Err(XattrProblem::Namespace) => {}
                Err(problem) => return Err(xattr_error(&xattr.0, &problem)),
            }
        }
        match EncodedXattrs::encode(&kept) {
            Ok(encoded) => Ok(encoded.map(|encoded| self.tree.add_xattrs(encoded))),
            Err(problem) => Err(xattr_error(b"", &problem)),
        }
    }

    /// Applies an entry that is a file of any kind, or a directory.
    pub(super) fn add(
        &mut self,
        name: &[u8],
        attributes: Attributes,
        body: Body,
    ) -> Result<(), EntryProblem> {
        match path::target(name)? {
            Target::File(components) => self.add_node(&components, Node { attributes, body }),
            Target::Whiteout(parents, hidden) => {
                let directory = self.directory(&parents)?;
                self.whiteouts.push((directory, hidden.into()));
                Ok(())
            }
            Target::Opaque(parents) => {
                let directory = self.directory(&parents)?;
                self.opaque.insert(directory);
                Ok(())
            }
            Target::Skip => Ok(()),
        }
    }

    /// Applies a hard link entry.
    pub(super) fn link(&mut self, name: &[u8], target: &[u8]) -> Result<(), EntryProblem> {
        let Target::File(components) = path::target(name)? else {
            // A whiteout is one whatever its type.
            return self.add(name, IMPLIED_ATTRIBUTES, Body::Fifo);
        };
        let is_directory = || EntryProblem::LinkTarget(crate::tar::shown(target));
        let target_components = path::components(target)?;
        let (target_last, target_parents) = target_components.split_last().ok_or_else(is_directory)?;
        let parent = self.find_directory(target_parents, false)?;
        let node = match parent.and_then(|parent| self.tree.child(parent, target_last)) {
            Some(node) if self.tree[node].is_directory() => return Err(is_directory()),
            Some(node) => node,
            None => self.lower_link(&target_components.join(&b'/'))?,
        };
        let (last, parents) = components.split_last().ok_or(EntryProblem::RootReplaced)?;
        let directory = self.directory(parents)?;
        self.tree.name(directory, last, node);
        Ok(())
    }

    /// What stands for a file of lower layers until the layers are merged.
    fn lower_link(&mut self, target: &[u8]) -> Result<NodeId, EntryProblem> {
        self.has_links = true;
        let marked = EncodedXattrs::with(None, marks::LINK, target)
            .map_err(|problem| xattr_error(marks::LINK, &problem))?;
        let attributes =
            Attributes { mode: 0, xattrs: Some(self.tree.add_xattrs(marked)), ..IMPLIED_ATTRIBUTES };
        let body = Body::File { size: 0, data: FileData::Plain { block: 0 } };
        Ok(self.tree.add(Node { attributes, body }))
    }

    fn add_node(&mut self, components: &[&[u8]], node: Node) -> Result<(), EntryProblem> {
        let Some((last, parents)) = components.split_last() else {
            if !node.is_directory() {
                return Err(EntryProblem::RootReplaced);
            }
            self.set_directory(Tree::ROOT, node.attributes);
            return Ok(());
        };
        let directory = self.directory(parents)?;
        if let Some(existing) = self.tree.child(directory, last)
            && node.is_directory()
            && self.tree[existing].is_directory()
        {
            self.set_directory(existing, node.attributes);
            return Ok(());
        }
        let id = self.tree.add(node);
        self.tree.name(directory, last, id);
        Ok(())
    }

    fn set_directory(&mut self, directory: NodeId, attributes: Attributes) {
        self.tree[directory].attributes = attributes;
        self.implied.remove(&directory);
    }

    /// The directory at a path, made if it is missing.
    fn directory(&mut self, components: &[&[u8]]) -> Result<NodeId, EntryProblem> {
        Ok(self.find_directory(components, true)?.unwrap_or(Tree::ROOT))
    }

    /// The directory at a path. If it is missing, it is made, or the answer is `None`.
    fn find_directory(&mut self, components: &[&[u8]], make: bool) -> Result<Option<NodeId>, EntryProblem> {
        let mut current = Tree::ROOT;
        for (index, component) in components.iter().enumerate() {
            let Some(child) = self.child_or_new(current, component, make) else { return Ok(None) };
            match self.tree[child].body {
                Body::Directory(_) => current = child,
                Body::Symlink(_) => return self.follow(components, index, make),
                _ => return Err(EntryProblem::NotADirectory),
            }
        }
        Ok(Some(current))
    }

    fn child_or_new(&mut self, directory: NodeId, name: &[u8], make: bool) -> Option<NodeId> {
        match self.tree.child(directory, name) {
            None if make => {
                let new = walk::make_directory(&mut self.tree, directory, name);
                self.implied.insert(new);
                Some(new)
            }
            child => child,
        }
    }

    /// As [`Self::find_directory`], for a path of which the first `plain` components are directories and the next
    /// one is a link. All is resolved below the root.
    fn follow(
        &mut self,
        components: &[&[u8]],
        plain: usize,
        make: bool,
    ) -> Result<Option<NodeId>, EntryProblem> {
        let mut stack: Vec<NodeId> = Vec::new();
        let (walked, rest) = components.split_at(plain);
        for component in walked {
            let current = stack.last().copied().unwrap_or(Tree::ROOT);
            stack.extend(self.tree.child(current, component));
        }
        let implied = &mut self.implied;
        let missing = |tree: &mut Tree, directory, name: &[u8]| {
            let new = make.then(|| walk::make_directory(tree, directory, name));
            implied.extend(new);
            new
        };
        let path = rest.join(&b'/');
        let walked = walk::to_directory(&mut self.tree, stack, &path, &mut self.link_steps, missing)?;
        Ok(walked.map(|stack| stack.last().copied().unwrap_or(Tree::ROOT)))
    }

    /// All entries were applied: whiteouts and marks become what overlayfs understands.
    pub(super) fn finish(mut self) -> Result<Tree, EntryProblem> {
        // First what becomes opaque, since whiteouts in there are not needed.
        let mut missing = Vec::new();
        for (directory, name) in std::mem::take(&mut self.whiteouts) {
            match self.tree.child(directory, &name) {
                Some(child) if self.tree[child].is_directory() => {
                    self.opaque.insert(child);
                }
                Some(_) => {}
                None => missing.push((directory, name)),
            }
        }
        missing.retain(|(directory, _)| !self.opaque.contains(directory));
        if !missing.is_empty() {
            // One inode for all, as overlayfs itself does.
            let attributes = Attributes { mode: 0, ..IMPLIED_ATTRIBUTES };
            let whiteout = self.tree.add(Node { attributes, body: Body::CharDevice(0) });
            for (directory, name) in missing {
                self.tree.name(directory, &name, whiteout);
            }
        }
        let (opaque, implied) = (std::mem::take(&mut self.opaque), std::mem::take(&mut self.implied));
        for (directories, mark) in [(opaque, OPAQUE), (implied, IMPLIED)] {
            // In a fixed order, so that the same layer gives the same bytes.
            let mut directories: Vec<_> = directories.into_iter().collect();
            directories.sort_unstable();
            for directory in directories {
                self.mark(directory, mark)?;
            }
        }
        if self.has_links {
            self.mark(Tree::ROOT, HAS_LINKS)?;
        }
        Ok(self.tree)
    }

    fn mark(&mut self, directory: NodeId, (name, value): (&[u8], &[u8])) -> Result<(), EntryProblem> {
        let attributes = &self.tree[directory].attributes;
        let marked = EncodedXattrs::with(attributes.xattrs.map(|set| self.tree.xattrs(set)), name, value)
            .map_err(|problem| xattr_error(name, &problem))?;
        let set = self.tree.add_xattrs(marked);
        self.tree[directory].attributes.xattrs = Some(set);
        Ok(())
    }
}

fn xattr_error(name: &[u8], problem: &XattrProblem) -> EntryProblem {
    let reason = match problem {
        XattrProblem::Namespace => "its namespace does not exist on Linux",
        XattrProblem::Name => "its name is empty or longer than 255 bytes",
        XattrProblem::Value => "its value is longer than 65535 bytes",
        XattrProblem::Acl => "it is not an access control list as the kernel knows them",
        XattrProblem::Total => "all attributes of one file together exceed 256 KiB",
    };
    EntryProblem::Xattr(crate::tar::shown(name), reason)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    fn file() -> Body {
        Body::Symlink(Box::from(&b"stands for any file"[..]))
    }

    fn directory() -> Body {
        Body::Directory(BTreeMap::new())
    }

    fn build(entries: &[(&str, Body)]) -> Result<Tree, EntryProblem> {
        let mut builder = LayerBuilder::new();
        for (name, body) in entries {
            builder.add(name.as_bytes(), IMPLIED_ATTRIBUTES, body.clone())?;
        }
        builder.finish()
    }

    fn find(tree: &Tree, path: &str) -> Option<NodeId> {
        path.split('/').try_fold(Tree::ROOT, |node, name| tree.child(node, name.as_bytes()))
    }

    fn has_mark(tree: &Tree, path: &str, mark: (&[u8], &[u8])) -> bool {
        let marked = EncodedXattrs::with(None, mark.0, mark.1).unwrap();
        let set = find(tree, path).and_then(|node| tree[node].attributes.xattrs);
        set.is_some_and(|set| *tree.xattrs(set) == marked)
    }

    #[test]
    fn whiteout_of_what_the_layer_lacks_is_a_device() {
        let tree = build(&[("d/.wh.gone", file())]).unwrap();
        let whiteout = find(&tree, "d/gone").unwrap();
        assert_eq!(tree[whiteout].body, Body::CharDevice(0));
    }

    #[test]
    fn whiteout_of_what_the_layer_has_hides_only_lower_layers() {
        for entries in [["x/.wh.y", "x/y"], ["x/y", "x/.wh.y"]] {
            let with_file = build(&entries.map(|name| (name, file()))).unwrap();
            assert_eq!(with_file[find(&with_file, "x/y").unwrap()].body, file());
            let with_directory = build(&entries.map(|name| (name, directory()))).unwrap();
            assert!(has_mark(&with_directory, "x/y", OPAQUE));
        }
    }

    #[test]
    fn whiteout_within_an_opaque_directory_is_not_needed() {
        let tree = build(&[("d", directory()), ("d/.wh.x", file()), ("d/.wh..wh..opq", file())]).unwrap();
        assert!(has_mark(&tree, "d", OPAQUE));
        assert_eq!(find(&tree, "d/x"), None);
        // Also where only a whiteout further up makes it opaque.
        let tree = build(&[("d/e/.wh.x", file()), ("d/.wh.e", file())]).unwrap();
        assert!(find(&tree, "d/e").is_some());
        assert_eq!(find(&tree, "d/e/x"), None);
    }

    #[test]
    fn directory_without_an_entry_is_marked_until_it_has_one() {
        let tree = build(&[("a/b/c", file()), ("a/b", directory())]).unwrap();
        assert!(has_mark(&tree, "a", IMPLIED));
        assert!(!has_mark(&tree, "a/b", IMPLIED));
    }

    #[test]
    fn path_through_links_stays_within_the_root() {
        let link = |target: &str| Body::Symlink(target.as_bytes().into());
        let tree = build(&[
            ("usr/lib", directory()),
            ("lib", link("../../usr/./lib")),
            ("abs", link("/lib")),
            ("abs/x", file()),
            ("dangling", link("/made/on/the/way")),
            ("dangling/y", file()),
        ]);
        let tree = tree.unwrap();
        assert!(find(&tree, "usr/lib/x").is_some());
        assert!(find(&tree, "made/on/the/way/y").is_some());
        let looped = build(&[("l", link("m")), ("m", link("l")), ("l/x", file())]);
        assert!(matches!(looped, Err(EntryProblem::LinkLoop)));
    }

    #[test]
    fn attributes_that_steer_overlayfs_or_do_not_exist_here_are_dropped() {
        let mut builder = LayerBuilder::new();
        let xattr = |name: &str| (name.as_bytes().to_vec(), b"y".to_vec());
        let dropped = ["trusted.overlay.opaque", "user.overlay.redirect", "com.apple.provenance", "user.a"];
        let set = builder.encode_xattrs(dropped.map(xattr).to_vec(), false).unwrap();
        assert_eq!(set, None);
        assert!(builder.encode_xattrs(vec![xattr("user.a")], true).unwrap().is_some());
    }
}
