"""The world `revision`: references of which only a few tokens depend on the chain of thought."""

from tokengrain.worlds.revision.appending import AppendedReferences, append_references
from tokengrain.worlds.revision.references import Reference, Role
from tokengrain.worlds.revision.rewards import correct
from tokengrain.worlds.revision.world import RevisionOptions, RevisionWorld

__all__ = [
    "AppendedReferences",
    "Reference",
    "RevisionOptions",
    "RevisionWorld",
    "Role",
    "append_references",
    "correct",
]
