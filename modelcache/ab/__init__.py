"""A/B testing: compare models without reloading them, and split traffic between them. Needs the extra ``[ab]``.

`compare` runs arms on the same items; `Experiment` gives each unit (a user, a session) its arm, and `analyse` reads
what it logged. `smallest_detectable` says before a run what a number of items can show.
"""

from __future__ import annotations

from modelcache.ab.arms import Arm
from modelcache.ab.assignment import Assignment, Layer, Split
from modelcache.ab.compare import compare
from modelcache.ab.comparison import Comparison
from modelcache.ab.experiment import Experiment, Serving
from modelcache.ab.exposures import Analysis, analyse
from modelcache.ab.inputs import InputError
from modelcache.ab.metrics import Metric
from modelcache.ab.statistics import smallest_detectable
from modelcache.ab.verdicts import Judgement, Verdict

__all__ = [
    "Analysis",
    "Arm",
    "Assignment",
    "Comparison",
    "Experiment",
    "InputError",
    "Judgement",
    "Layer",
    "Metric",
    "Serving",
    "Split",
    "Verdict",
    "analyse",
    "compare",
    "smallest_detectable",
]
