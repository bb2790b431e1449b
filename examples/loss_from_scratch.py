"""The DPO loss in 30 lines of PyTorch, and that fastdpo computes the same.

    python examples/loss_from_scratch.py                 # the demo's tiny Llama, 6 s on two cores
    python examples/loss_from_scratch.py --model Qwen/Qwen3-0.6B --dataset my_pairs.jsonl

Everything that fastdpo does is meant to give these numbers with less work.
"""

import torch
import torch.nn.functional as F
from example_inputs import parse
from fastdpo_kernels import linear_logprobs
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastdpo import DPOConfig, DPOTrainer
from fastdpo.data import prepare_pairs, read_held_out
from fastdpo.losses import LOSSES, PairLogps
from fastdpo.options import LossOptions

BETA = 0.1


# The loss from scratch: transformers' logits, a log-softmax, a difference of differences.


def completion_logp(model, prompt, completion):
    """log p(completion | prompt): the log-probs of its tokens, added up."""
    ids = torch.cat([prompt, completion])[None]
    logits = model(input_ids=ids).logits[0, :-1].float()  # row i predicts token i + 1
    token_logps = logits.log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0]
    return token_logps[len(prompt) - 1 :].sum()


def dpo_loss(policy, reference, pairs):
    losses = []
    for prompt, chosen, rejected in pairs:
        policy_says = completion_logp(policy, prompt, chosen)
        policy_says = policy_says - completion_logp(policy, prompt, rejected)
        with torch.no_grad():
            reference_says = completion_logp(reference, prompt, chosen)
            reference_says = reference_says - completion_logp(reference, prompt, rejected)
        losses.append(-F.logsigmoid(BETA * (policy_says - reference_says)))
    return torch.stack(losses).mean()


# The same from fastdpo's parts.


def kernel_logp(model, prompt, completion):
    """Compute `completion_logp` without logits: from hidden states and the rows of the head."""
    ids = torch.cat([prompt, completion])[None]
    states = model.get_decoder()(input_ids=ids).last_hidden_state[0, len(prompt) - 1 : -1]
    return linear_logprobs(states, model.get_output_embeddings().weight, completion).sum()


def loss_of_parts(policy, reference, pairs):
    both = [
        torch.stack(
            [torch.stack([kernel_logp(model, p, c), kernel_logp(model, p, r)]) for p, c, r in pairs]
        )
        for model in (policy, reference)
    ]
    lengths = torch.tensor([[len(c), len(r)] for _, c, r in pairs])
    return LOSSES["sigmoid"](PairLogps(*both, lengths), LossOptions(beta=BETA)).mean()


def main(argv=None):
    inputs = parse(__doc__, argv)
    tokenizer = AutoTokenizer.from_pretrained(inputs.model)
    reference = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32)
    policy = AutoModelForCausalLM.from_pretrained(inputs.model, dtype=torch.float32)
    torch.manual_seed(0)
    for parameter in policy.parameters():  # some policy that is not the reference
        parameter.data += 0.01 * torch.randn_like(parameter)
    prepared = prepare_pairs(read_held_out(inputs.eval_dataset).take(range(8)), tokenizer)
    parts = ("prompt_ids", "chosen_ids", "rejected_ids")
    pairs = [tuple(torch.tensor(getattr(pair, part)).long() for part in parts) for pair in prepared]
    config = DPOConfig(inputs.output_dir, beta=BETA, disable_tqdm=True, use_cpu=True)
    results = {"from scratch": dpo_loss(policy, reference, pairs).item()}
    results["losses and linear_logprobs"] = loss_of_parts(policy, reference, pairs).item()
    trainer = DPOTrainer(policy, reference, config, None, None, prepared, tokenizer)
    results["DPOTrainer"] = trainer.evaluate()["eval_loss"]
    for name, loss in results.items():
        print(f"{name:28}{loss:.7f}")
    return results


if __name__ == "__main__":
    main()
