"""Images of one part of a domain, prepared and stacked; and a domain of such parts."""

from __future__ import annotations

from medrl.core.adaptation import sets
from medrl.core.adaptation.sets import ImageSet

from .plan import SamplePlan

__all__ = ["Domain", "ImageSet"]


class Domain(sets.Domain[ImageSet, SamplePlan]):
    """The images of one domain by their duty; an image is a case, or one slice of it (``_z<slice>``)."""
