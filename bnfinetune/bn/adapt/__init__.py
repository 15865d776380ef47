"""Test-time adaptation: trained models made to fit unlabelled data of another domain."""

from bnfinetune.bn.adapt.ema import StreamEma
from bnfinetune.bn.adapt.methods import ADAPTATIONS, adapt_model
from bnfinetune.bn.adapt.tent import Tent

__all__ = ["ADAPTATIONS", "StreamEma", "Tent", "adapt_model"]
