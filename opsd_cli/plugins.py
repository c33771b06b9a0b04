"""Fills the registries: imports every module that registers a plug-in. Torch-free, so that a command line can be
validated before anything heavy is loaded. A new module with plug-ins is added here and nowhere else."""

import opsd_cli.data.arithmetic
import opsd_cli.data.datasets
import opsd_cli.launcher
import opsd_cli.method.divergence
import opsd_cli.method.sampler
import opsd_cli.method.sampler_continuous
import opsd_cli.method.sampler_vllm
import opsd_cli.method.teacher  # noqa: F401
