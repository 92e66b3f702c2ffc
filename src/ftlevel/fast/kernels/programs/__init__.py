"""The Triton programs. Import these only where Triton is.

All arithmetic is in float32, and a number is rounded where torch's operations would write it.
"""

from ftlevel.fast.kernels.programs.cross_entropy import cross_entropy
from ftlevel.fast.kernels.programs.norms_glus import glu, glu_backward, norm, norm_backward, renorm
from ftlevel.fast.kernels.programs.rope import rope

__all__ = ["cross_entropy", "glu", "glu_backward", "norm", "norm_backward", "renorm", "rope"]
