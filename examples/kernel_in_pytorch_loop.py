"""fastdpo's cross entropy in a plain PyTorch loop: the (N, V) logits are never built.

    python examples/kernel_in_pytorch_loop.py            # a tiny random Llama, 5 s on two cores
    python examples/kernel_in_pytorch_loop.py --model Qwen/Qwen3-0.6B --device cuda

Trains twice from the same weights, once the usual way and once with the kernel, and prints both
losses. What changed lies in `kernel_loss`.
"""

import argparse
import copy

import torch
import torch.nn.functional as F
from fastdpo_kernels import linear_cross_entropy
from transformers import AutoModelForCausalLM, LlamaConfig


def usual_loss(model, input_ids, labels):
    logits = model(input_ids=input_ids).logits[:, :-1].float()  # (B, T, V): the memory
    return F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())


def kernel_loss(model, input_ids, labels):
    # Changed: the backbone alone, its states with the head's rows in place of the logits.
    hidden_states = model.get_decoder()(input_ids=input_ids).last_hidden_state[:, :-1]
    head = model.get_output_embeddings()
    return linear_cross_entropy(
        hidden_states, head.weight, labels[:, 1:], linear_bias=head.bias
    )  # softcap= for Gemma 2, logit_scale= for Cohere and Granite


def train(model, loss_function, batches):
    """The loss of every update."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    losses = []
    for input_ids, labels in batches:
        loss = loss_function(model, input_ids, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="a causal LM of the hub, or its folder")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--updates", type=int, default=5)
    options = parser.parse_args(argv)
    torch.manual_seed(0)
    if options.model is None:
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
        config = LlamaConfig(vocab_size=1000, num_hidden_layers=2, **sizes)
        model = AutoModelForCausalLM.from_config(config)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.model)
    model.to(options.device)
    batches = []
    for _ in range(options.updates):
        input_ids = torch.randint(model.config.vocab_size, (4, 48), device=options.device)
        labels = input_ids.clone()
        labels[:, :16] = -100  # a prompt, which is not learned: its positions cost nothing
        batches.append((input_ids, labels))
    usual = train(copy.deepcopy(model), usual_loss, batches)
    kernel = train(model, kernel_loss, batches)
    for update, (one, other) in enumerate(zip(usual, kernel, strict=True), 1):
        print(f"update {update}  usual {one:.6f}  kernel {other:.6f}")
    return usual, kernel


if __name__ == "__main__":
    main()
