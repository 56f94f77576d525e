"""``headinfer probe``: measure the rates of this machine, and what of it is free."""

from __future__ import annotations

import logging
from dataclasses import fields

import torch
from transformers import PreTrainedModel

from headinfer_compile.machine import Machine, Rates, device_name, load_profile
from headinfer_compile.runtime.budget import default_host_budget, device_room

log = logging.getLogger(__name__)


def this_machine(*, measure: bool = True, model: PreTrainedModel | None = None) -> Machine:
    """This machine as a plan may use it.

    Args:
        measure: Measure its rates where none are kept; else they stay assumed.
        model: A live model, whose weights are counted by the plan and not as taken.
    """
    profile = load_profile()
    gpu_memory = 0
    if torch.cuda.is_available():
        gpu_memory = device_room(torch.device("cuda", torch.cuda.current_device()))
        if model is not None:
            gpu_memory += sum(p.nbytes for p in model.parameters() if p.device.type == "cuda")
    if profile is None:
        rates = Rates(assumed=tuple(f.name for f in fields(Rates) if f.name != "assumed"))
        source = "assumed"
    else:
        rates, source = profile.rates, f"measured on {profile.device}"
    return Machine(device_name(), gpu_memory, default_host_budget(), rates, source=source)
