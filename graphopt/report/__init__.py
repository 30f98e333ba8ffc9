"""What happened to a model: applied, refused and rolled back rewrites, errors, cost, time."""

from graphopt.report.laws import Law as Law
from graphopt.report.report import Capture as Capture, Report as Report
from graphopt.report.story import (
    Story as Story,
    UnknownModule as UnknownModule,
    listing as listing,
    modules_of as modules_of,
)
