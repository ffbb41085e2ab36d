"""Networks of spars that tell whether a window holds the object.

`FaithfulNet` is that of the original; `CompactNet` takes windows of any size and has a dense form.
"""

from .compact import CompactNet
from .faithful import FaithfulNet, FusedFaithfulNet

__all__ = ["CompactNet", "FaithfulNet", "FusedFaithfulNet"]
