"""Frozen pydantic configuration sections, built from recipe and flags. Does not import torch."""

from ftlevel.config.evaluation import EvaluateConfig, GenerateConfig, PredictConfig
from ftlevel.config.gate import GateConfig
from ftlevel.config.layers import (
    Layer,
    build_config,
    build_section,
    load_recipe,
    parse_overrides,
    put,
)
from ftlevel.config.merge import MergeConfig, QuantizeConfig
from ftlevel.config.methods import SPECS, LoraSpec, MethodConfig, MethodSpec
from ftlevel.config.output import OutputConfig
from ftlevel.config.reading import normalize_task
from ftlevel.config.sections import (
    DEFAULT_DATASET,
    DEFAULT_MODEL,
    DataConfig,
    ModelConfig,
    QuantConfig,
    Section,
    SpeedConfig,
)
from ftlevel.config.sections import IN_MEMORY as IN_MEMORY
from ftlevel.config.sections import InMemoryDataset as InMemoryDataset
from ftlevel.config.tasks import TASKS, TaskName
from ftlevel.config.train import TrainConfig
from ftlevel.config.trainer import TrainerConfig

__all__ = [
    "DEFAULT_DATASET",
    "DEFAULT_MODEL",
    "SPECS",
    "TASKS",
    "DataConfig",
    "EvaluateConfig",
    "GateConfig",
    "GenerateConfig",
    "Layer",
    "LoraSpec",
    "MergeConfig",
    "MethodConfig",
    "MethodSpec",
    "ModelConfig",
    "OutputConfig",
    "PredictConfig",
    "QuantConfig",
    "QuantizeConfig",
    "Section",
    "SpeedConfig",
    "TaskName",
    "TrainConfig",
    "TrainerConfig",
    "build_config",
    "build_section",
    "load_recipe",
    "normalize_task",
    "parse_overrides",
    "put",
]
