"""What would help where a rewrite was refused, or taken back, as far as its reason tells."""

from __future__ import annotations

import re

ADVICE = {
    r"call model\.eval|batch statistics \(training|masks or drops":
        "Call model.eval() before optimizing.",
    r"keeps no running statistics":
        "Only a norm with track_running_stats=True is a fixed scale and shift.",
    r"part of the model that was not captured":
        "The summary says under “left eager” why it was not captured.",
    r"it would take .* instead of":
        "Nothing to do: by the measured costs of this target it would be slower. Another backend has other "
        "costs.",
    r"(used|read|computed) (elsewhere|in other places)|is read for more":
        "It has another reader, and would be computed twice. Nothing to do unless that reader goes.",
    r"share memory":
        "A result would become a view of something else: return a copy, .clone(), in the model.",
    r"budget|max_error":
        "Allow more in the options of the pass, if that loss is acceptable, or give data that is more like "
        "the real inputs.",
    r"dynamic":
        "Fix that size with dynamic_shapes, if it never changes.",
    r"rounds|dtype|computed in":
        "Use one dtype on both sides of it.",
    r"the whole model failed its check":
        "graphopt bisect SOURCE finds the one application that breaks it.",
}  # fmt: skip
REFUSED = "It is a precondition of the rewrite; graphopt passes {name} lists all of them."
ROLLED_BACK = (
    "The rewrite is wrong here, or rounds more than it may: graphopt bisect SOURCE writes a small script "
    "that shows it."
)


def advice(reason: str, rewrite: str, refused: bool) -> str:
    """One sentence or two for the user."""
    for pattern, text in ADVICE.items():
        if re.search(pattern, reason):
            return text
    return REFUSED.format(name=rewrite) if refused else ROLLED_BACK
