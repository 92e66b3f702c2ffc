"""AdaLoRA: builds `peft.AdaLoraConfig`, its orthogonality penalty, and its plain-LoRA form.

    R(P, Q) = ‖PᵀP − I‖ + ‖QQᵀ − I‖                  Zhang et al., 2023, equation 4
    ΔW = B · diag(E) · A · alpha / (init_r + 1e-5)

The penalty is averaged over matrices, as in `peft.AdaLoraModel.forward`. As in PEFT, ΔW is divided
by the initial rank even after pruning, and a non-positive alpha means that rank.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ftlevel.config.methods.lora import AdaloraSpec
from ftlevel.errors import ConfigError, InputError, join_names
from ftlevel.methods.base import Base, MergeInfo, Method, as_int
from ftlevel.methods.lora import get_merge_error
from ftlevel.methods.lora_conversion import AdapterFile, Factors, LoraConversion
from ftlevel.methods.rates import Rates
from ftlevel.methods.support_table import MERGES, single_row
from ftlevel.methods.upstream import freeze_ranks, reset_ranks


def as_lora(file: AdapterFile) -> dict[str, Factors]:
    """Returns module name → equivalent LoRA factors; raises `InputError` if biases were trained."""
    config = file.config
    if config.get("bias", "none") != "none":
        raise InputError("bias is set: biases of the base were trained. Merge it")
    first = config["init_r"]
    scale = (config["lora_alpha"] if config["lora_alpha"] > 0 else first) / (first + 1e-5)
    factors = {}
    for name in file.names("lora_E"):
        e, a, b = file.pop(name, "lora_E", "lora_A", "lora_B")
        factors[name] = Factors(a * e, b * scale)
    ranks = sorted({update.rank for update in factors.values()})
    file.notes.append(
        f"singular values and scale {scale:.3g} (AdaLoRA) folded in; ranks left "
        f"{join_names(map(str, ranks), 6)}"
    )
    return factors


_TINIT, _TFINAL = 0.1, 0.3


def _reset_ranks(config: Any) -> None:
    """Unset `rank_pattern` of `config` (modified): PEFT would prune the saved matrices again."""
    config.rank_pattern = None
    config.init_lora_weights = True


class AdaLora(Method):
    """The method AdaLoRA: its PEFT configuration, rank pruning and merge."""

    info = single_row(
        "adalora",
        "LoRA with ranks pruned by importance",
        MERGES,
        "Zhang et al., 2023, arXiv:2303.10512",
        29_985_408,
    )
    rate = Rates(small=1e-2, large=1e-3, source="within the paper's range on GLUE")
    resume_error = "its ranks are pruned by a schedule over all steps of the run"
    changes_shape = True
    merge_info = MergeInfo(
        ("ADALORA",),
        get_error=get_merge_error,
        prepare=_reset_ranks,
        restore=reset_ranks,
        lora_conversion=LoraConversion(as_lora),
    )

    def build(self, spec: AdaloraSpec, base: Base) -> Any:
        """Returns `peft.AdaLoraConfig`, whose schedule depends on the number of steps.

        Raises `ConfigError` if fewer than 2 steps remain between `tinit` and `tfinal`.
        """
        from peft import AdaLoraConfig

        steps = base.total_steps
        tinit = int(_TINIT * steps) if spec.tinit == "auto" else spec.tinit
        tfinal = int(_TFINAL * steps) if spec.tfinal == "auto" else spec.tfinal
        if steps - tinit - tfinal < 2:  # the first step only measures
            raise ConfigError(
                f"method.tinit {tinit} and method.tfinal {tfinal} leave fewer than 2 of the run's "
                f"{steps:,} steps to prune ranks in. Train longer, or lower them."
            )
        return AdaLoraConfig(
            **base.shared,
            init_r=spec.init_r,
            target_r=spec.target_r,
            lora_alpha=as_int(spec.lora_alpha),
            lora_dropout=spec.lora_dropout,
            tinit=tinit,
            tfinal=tfinal,
            deltaT=spec.delta_t,
            beta1=spec.beta1,
            beta2=spec.beta2,
            orth_reg_weight=spec.orth_reg_weight,
            total_step=steps,
            fan_in_fan_out=base.fan_in_fan_out,
        )

    def prepare(self, model: Any) -> None:
        """Freeze the `ranknum` parameters of `model` (modified), which count ranks."""
        freeze_ranks(model)

    def callbacks(self, spec: AdaloraSpec, checkpoint_dir: Path, should_save: bool) -> list[Any]:
        """Returns the callback that prunes ranks and saves them in checkpoints."""
        from ftlevel.methods.adalora.callback import RankPruningCallback

        return [RankPruningCallback(checkpoint_dir, should_save=should_save)]

    def penalty(self, model: Any) -> Any:
        """Returns the weighted orthogonality penalty, a scalar in float32."""
        import torch

        norms = []
        for name, matrix in model.named_parameters():
            if ".lora_A.default" in name or ".lora_B.default" in name:
                # A is (r, in) and B is (out, r): both products are (r, r).
                product = matrix @ matrix.T if ".lora_A." in name else matrix.T @ matrix
                eye = torch.eye(len(product), device=product.device, dtype=product.dtype)
                norms.append(torch.linalg.matrix_norm(product - eye))
        return model.peft_config["default"].orth_reg_weight * torch.stack(norms).mean()

    def finish(self, model: Any) -> None:
        """Remove the rows and columns of pruned ranks from the matrices of `model` (modified)."""
        import torch

        for name, alive in (model.peft_config["default"].rank_pattern or {}).items():
            layer = model.get_base_model().get_submodule(name.partition(".lora_E")[0])
            mask = torch.tensor(alive, dtype=torch.bool)
            for matrices, axis in ((layer.lora_E, 0), (layer.lora_A, 0), (layer.lora_B, 1)):
                full = matrices["default"]
                block = full.data[mask] if axis == 0 else full.data[:, mask]
                matrices["default"] = torch.nn.Parameter(block, full.requires_grad)
            layer.r["default"] = sum(alive)


METHODS = {"adalora": AdaLora()}
