"""Scores of what a pipeline draws, or of pictures: against a reference, prompts, and the unaccelerated pipeline."""

from diffattn.evaluation.config import EvaluateConfig
from diffattn.evaluation.draw_set import DrawConfig
from diffattn.evaluation.evaluate import evaluate

__all__ = ["DrawConfig", "EvaluateConfig", "evaluate"]
