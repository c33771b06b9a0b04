"""Fills the registries: imports every module that registers a plug-in. Torch-free, so that a command line can be
validated before anything heavy is loaded. A new module with plug-ins is added here and nowhere else."""

import opsd_cli.data.arithmetic
import opsd_cli.data.datasets
import opsd_cli.data.graders
import opsd_cli.data.second_opinion
import opsd_cli.data.token_rules
import opsd_cli.launch.launchers
import opsd_cli.launch.over_ssh
import opsd_cli.launch.slurm
import opsd_cli.loss.divergences
import opsd_cli.loss.routed
import opsd_cli.sampling.samplers
import opsd_cli.sampling.vllm
import opsd_cli.teachers.teachers  # noqa: F401
