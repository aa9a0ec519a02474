//! Paths through a tree, with its symbolic links followed below its root.

use std::collections::BTreeMap;

use super::builder::{EntryProblem, IMPLIED_ATTRIBUTES};
use super::path::PathProblem;
use crate::limits::{MAX_LINK_DEPTH, MAX_LINK_STEPS, NAME_MAX};
use crate::tree::{Body, Node, NodeId, Tree};

/// Walks along `path` to a directory. It starts at the last of `stack`, the directories from the root down to there
/// without the root itself, and gives the same of where it ends. What is missing on the way may be made; if it is not,
/// the answer is `None`. `steps` counts what all walks of a layer cost.
pub(crate) fn to_directory(
    tree: &mut Tree,
    mut stack: Vec<NodeId>,
    path: &[u8],
    steps: &mut u64,
    mut missing: impl FnMut(&mut Tree, NodeId, &[u8]) -> Option<NodeId>,
) -> Result<Option<Vec<NodeId>>, EntryProblem> {
    let mut pending: Vec<Box<[u8]>> = reversed(path).collect();
    let mut links = 0;
    while let Some(component) = pending.pop() {
        *steps += 1;
        if *steps > MAX_LINK_STEPS {
            return Err(EntryProblem::LinkSteps);
        }
        match &*component {
            b"" | b"." => continue,
            b".." => {
                stack.pop();
                continue;
            }
            name if name.len() > NAME_MAX => return Err(PathProblem::NameTooLong.into()),
            _ => {}
        }
        let current = stack.last().copied().unwrap_or(Tree::ROOT);
        let child = tree.child(current, &component).or_else(|| missing(tree, current, &component));
        let Some(child) = child else { return Ok(None) };
        match &tree[child].body {
            Body::Directory(_) => stack.push(child),
            Body::Symlink(target) => {
                links += 1;
                if links > MAX_LINK_DEPTH {
                    return Err(EntryProblem::LinkLoop);
                }
                if target.starts_with(b"/") {
                    stack.clear();
                }
                pending.extend(reversed(target));
            }
            _ => return Err(EntryProblem::NotADirectory),
        }
    }
    Ok(Some(stack))
}

/// A new directory that no entry says anything of.
pub(crate) fn make_directory(tree: &mut Tree, parent: NodeId, name: &[u8]) -> NodeId {
    let new = tree.add(Node { attributes: IMPLIED_ATTRIBUTES, body: Body::Directory(BTreeMap::new()) });
    tree.name(parent, name, new);
    new
}

/// A path's components, last first.
fn reversed(path: &[u8]) -> impl Iterator<Item = Box<[u8]>> + '_ {
    path.split(|&byte| byte == b'/').rev().map(Box::from)
}
