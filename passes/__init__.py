"""The rewrites, one file each, in the order in which they run."""

from __future__ import annotations

from ..optimizer.rewrite import Pass
from .approximate_gelu import ApproximateGelu
from .batch_timesteps import BatchTimesteps
from .fuse_attention import FuseAttention
from .fuse_iterations import FuseIterations
from .fuse_multiply_add import FuseMultiplyAdd
from .fuse_projections import FuseProjections
from .fuse_recurrences import FuseRecurrences
from .lower_einops import LowerEinops
from .lower_scans import LowerScans
from .parallelize_recurrence import ParallelizeRecurrence
from .reroll_loops import RerollLoops
from .slice_indices import SliceIndices
from .store_carries import StoreCarries
from .vectorize_patches import VectorizePatches

ORDER: tuple[Pass, ...] = (
    RerollLoops(),  # first: it makes the loops visible to all others
    BatchTimesteps(),  # empties the scans that carry something, as far as that goes
    VectorizePatches(),  # then those that carry nothing: all of them
    SliceIndices(),  # tables that stood in loops are in the open now
    LowerEinops(),  # after batching, which keeps an einsum one einsum
    FuseProjections(),  # of products, which einsums are now
    FuseAttention(),  # attention over heads or windows that stood in loops is whole now
    ApproximateGelu(),  # one gelu over all steps, not one for each
    ParallelizeRecurrence(),  # of running sums whose terms are batched now
    FuseRecurrences(),  # before what only saves calls, which a kernel has none of
    StoreCarries(),  # for the backward of those kernels
    FuseIterations(),  # of batched and lowered products, before their sums are taken apart
    FuseMultiplyAdd(),  # after attention, whose mask is an addition
    LowerScans(),  # last: what is still a scan runs as a loop
)
