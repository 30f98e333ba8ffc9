"""What happened to a model: applied, refused and rolled back rewrites, errors, cost, time."""

from graphopt.report.report import Capture as Capture, Report as Report
