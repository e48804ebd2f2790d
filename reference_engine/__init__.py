# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""A small serving engine on pallas_paged: LLM serves the folder of a model, Engine token ids."""

from reference_engine.config import EngineConfig, ModelConfig
from reference_engine.engine import Engine
from reference_engine.llm import LLM
from reference_engine.request import FinishReason
from reference_engine.sampling_params import SamplingParams

__all__ = ["LLM", "Engine", "EngineConfig", "FinishReason", "ModelConfig", "SamplingParams"]
