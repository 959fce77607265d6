"""Scores of what a pipeline draws, or of pictures: against a reference, prompts, and the unaccelerated pipeline."""

from diffattn.evaluation.config import EvaluateConfig
from diffattn.evaluation.draw_set import DrawConfig
from diffattn.evaluation.evaluate import evaluate
from diffattn.evaluation.prompts import load_prompts

__all__ = ["DrawConfig", "EvaluateConfig", "evaluate", "load_prompts"]
