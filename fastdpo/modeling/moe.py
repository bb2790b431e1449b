"""The routers of mixture-of-experts models: how evenly they use their experts."""

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fastdpo.modeling.head import get_backbone


def load_balancing_loss(
    router_logits: tuple[Tensor, ...], real: Tensor, experts_per_token: int
) -> Tensor:
    """The auxiliary loss that keeps experts evenly used, over real tokens only.

    With f_e the share of (token, layer)s that chose expert e, counted once for every choice, and
    P_e the mean probability that routers gave it, it is the number of experts times the sum of
    f_e P_e: `experts_per_token` when all is even. Only P_e has a gradient.

    Args:
        router_logits: per layer (T, experts), before the softmax.
        real: (T,) bool, False for filler.
        experts_per_token: how many experts a token chooses.

    Returns:
        () float32.

    Source: arXiv:2101.03961, equations 4 to 6, as transformers computes them.
    """
    # (layers * T', experts): all layers are one population, as in transformers.
    logits = torch.cat([layer[real] for layer in router_logits])
    experts = logits.shape[-1]
    probabilities = logits.softmax(dim=-1)
    chosen = probabilities.detach().topk(experts_per_token, dim=-1).indices
    shares = nn.functional.one_hot(chosen, experts).sum(dim=(0, 1)).float() / len(logits)
    return experts * (shares * probabilities.float().mean(dim=0)).sum()


def has_routers(causal_lm: PreTrainedModel) -> bool:
    """Tell whether a model has routers whose logits it gives; its config alone does not say so.

    A config of a family with experts may ask for dense layers only.
    """
    if not hasattr(causal_lm.config.get_text_config(), "output_router_logits"):
        return False
    backbone = get_backbone(causal_lm)
    recorded = (getattr(backbone, "_can_record_outputs", None) or {}).get("router_logits")
    if recorded is None:  # it gives them some other way, if at all
        return True
    entries = recorded if isinstance(recorded, list | tuple) else [recorded]
    classes = tuple(getattr(entry, "target_class", entry) for entry in entries)
    return any(isinstance(module, classes) for module in backbone.modules())


def aux_loss_coef(causal_lm: PreTrainedModel, requested: float | None) -> float:
    """The weight of the load-balancing loss: the requested one, else the model's own.

    Args:
        causal_lm: the model.
        requested: `router_aux_loss_coef` of the options, or None.

    Returns:
        0 for a model without routers.

    Raises:
        ValueError: a weight is requested and there are no routers.
    """
    config = causal_lm.config
    if has_routers(causal_lm):
        default = getattr(config.get_text_config(), "router_aux_loss_coef", 0.0)
        return default if requested is None else requested
    if requested:
        raise ValueError(
            f"--router_aux_loss_coef is {requested}, and {config.model_type} is no mixture of "
            "experts that shows its routers: leave it out."
        )
    return 0.0
