"""The public names of graphopt, which `import graphopt` has from here; see `graphopt/__init__.py`."""

from graphopt.adaptation import (
    AdaptError as AdaptError,
    adapt_norm as adapt_norm,
)
from graphopt.artifact import ArtifactError as ArtifactError, load as load
from graphopt.bisect import BisectError as BisectError, Bisection as Bisection, bisect as bisect
from graphopt.channels import channel_groups as channel_groups
from graphopt.export import Export as Export, export as export
from graphopt.filecheck import ExportError as ExportError
from graphopt.fleet.checkpoint import rewrite_checkpoint as rewrite_checkpoint
from graphopt.fleet.mapped import CheckpointError as CheckpointError
from graphopt.ir.contracts import (
    Algebraic as Algebraic,
    Calibrated as Calibrated,
    Exact as Exact,
    Masked as Masked,
)
from graphopt.ir.pattern import rewrite_from as rewrite_from
from graphopt.ir.rewrite import Rewriter as Rewriter, rewrite as rewrite
from graphopt.ir.source import CaptureError as CaptureError
from graphopt.ir.variants import NotAVariant as NotAVariant
from graphopt.module import InputError as InputError, OptimizedModule as OptimizedModule
from graphopt.multi import multi as multi
from graphopt.optimize import declared_inputs as declared_inputs, optimize as optimize
from graphopt.passes.base import Pass as Pass, PassError as PassError, RewritePass as RewritePass
from graphopt.pipeline import Pipeline as Pipeline, PipelineError as PipelineError
from graphopt.pruned import NotExpressible as NotExpressible, prune_module as prune_module
from graphopt.report import Report as Report, Story as Story, UnknownModule as UnknownModule
from graphopt.signing import (
    SignatureError as SignatureError,
    sign as sign,
    verify_signature as verify_signature,
)
from graphopt.streaming import (
    Streaming as Streaming,
    StreamingError as StreamingError,
    streaming as streaming,
)
from graphopt.training.swaps import (
    SwapError as SwapError,
    swap_attention as swap_attention,
    swap_norm as swap_norm,
)
from graphopt.verify.compare import Comparison as Comparison, verify as verify
from graphopt.verify.side import VerifyError as VerifyError
