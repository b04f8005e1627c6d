"""Two language models share VRAM for one; each generates, and the other is parked without being copied."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel

from modelcache import ModelCache, Tier


def load(seed: int) -> GPT2LMHeadModel:
    """`AutoModelForCausalLM.from_pretrained("path/or/repo")` would stand here; this one has random weights."""
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=512, n_positions=64, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).eval()


def main() -> None:
    with ModelCache(vram="1MiB", ram="64MiB", device="simulated") as cache:
        for seed, name in enumerate(("qwen", "llama")):
            cache.register(name, lambda seed=seed: load(seed), reload=True, workspace="64KiB")  # room for its KV cache
        prompt = torch.tensor([[1, 2, 3]])
        for name in ("qwen", "llama", "qwen"):
            model = cache.get(name)
            ids = model.generate(input_ids=prompt.to(model.device), max_new_tokens=8, do_sample=False, pad_token_id=0)
            print(name, "wrote", ids.shape[1] - prompt.shape[1], "tokens from", cache.info(name).tier)
        print(
            "llama is in",
            cache.info("llama").tier,
            "and comes back without the disk:",
            cache.info("llama").tier is Tier.RAM,
        )


if __name__ == "__main__":
    main()
