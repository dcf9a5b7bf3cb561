"""One small pass over every CUDA kernel, forward and backward, to run under compute-sanitizer and the emulator,
which fails where a kernel is missing."""

import itertools

import torch

import entropy_rl_ext as ext

LOSS_MODES = ["vanilla", "gpg", "clip_cov", "kl_cov", "gspo", "geo_mean"]
LOSS_MODES += ["dppo_tv", "dppo_kl", "sapo", "dro", "cispo"]
CLIP = ["vanilla", "clip_cov", "gspo", "geo_mean", "dppo_tv", "dppo_kl", "cispo"]  # by numbers, or by each token's own
KL_TYPES = ["abs", "abs+", "k1", "k1+", "k2", "k3", "k3+"]


def losses(dtype: torch.dtype) -> None:
    mask = torch.rand(3, 70, device="cuda") < 0.8
    chosen = ext.global_top_mask(torch.rand(3, 70, device="cuda"), mask)
    old, advantages = torch.randn(2, 3, 70, device="cuda").to(dtype)
    low, high = torch.rand(2, 3, 70, device="cuda").to(dtype)
    of_tokens = {"clip_ratio_low": low, "clip_ratio_high": high}
    for mode, clip_ratios in [*((mode, {}) for mode in LOSS_MODES), *((mode, of_tokens) for mode in CLIP)]:
        leaf = torch.randn(3, 70, device="cuda").to(dtype).requires_grad_()
        extra = {"dro_beta": 0.1} if mode == "dro" else clip_ratios
        loss, _ = ext.policy_loss(leaf, old, advantages, mask, loss_mode=mode, entropy_mask=chosen, **extra)
        (loss + ext.aggregate(leaf, mask)).backward()
    for kind in KL_TYPES:
        leaf = torch.randn(3, 70, device="cuda").to(dtype).requires_grad_()
        ext.kl_loss(leaf, old, mask, kl_loss_type=kind).backward()
    # More tokens than one block chooses from.
    many = torch.randn(3, 3001, device="cuda").to(dtype)
    for mode in ("clip_cov", "kl_cov"):
        ext.policy_loss(many, many, many, many > -9, loss_mode=mode)


def main() -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        # The last: rows of several parts, few enough for a block each.
        for rows, vocab in ((70, 1), (70, 33), (300, 4099), (2, 20_001)):
            logits = torch.randn(3, rows, vocab, device="cuda").to(dtype)[..., : max(1, vocab - 1)].requires_grad_()
            targets = torch.randint(0, logits.shape[-1], (3, rows), device="cuda")
            keep = torch.rand(3, rows, device="cuda") < 0.8
            log_prob, entropy = ext.logprob_entropy(logits, targets, mask=keep, entropy_grad=True)
            (log_prob.sum() + entropy.sum() + ext.token_entropy(logits).sum()).backward()
            hidden = torch.randn(3, rows, 24, device="cuda").to(dtype).requires_grad_()
            weight, bias = (torch.randn(logits.shape[-1], *n, device="cuda").to(dtype) for n in ((24,), ()))
            outputs = ext.linear_logprob_entropy(
                hidden, weight.requires_grad_(), targets, bias=bias, mask=keep, softcap=3.0, chunk_rows=64,
                entropy_grad=True, max_grad_rows=3 * rows, token_statistics=vocab == 33,
            )  # fmt: skip
            (outputs[0].sum() + outputs[1].sum()).backward()
        ratio = torch.tensor(0.2, dtype=torch.float64)
        group_ids = torch.tensor([7, 1, 7], device="cuda")
        for rule, scope, algorithm, columns in itertools.product(
            ("topk", "threshold", "quantile"), ("batch", "sequence", "group"), ("sort", "radix"), (70, 9001)
        ):
            entropy = (torch.rand(3, columns, device="cuda") * 20).round().to(dtype)
            torch.ops.entropy_rl.global_top_mask_forward(
                entropy, entropy > 1, ratio, rule, scope, group_ids if scope == "group" else None, algorithm
            )
        for rule, columns in itertools.product(("topk", "threshold", "quantile"), (70, 9001)):
            values = (torch.rand(3, columns, device="cuda") * 20).round().to(dtype)
            ext.global_top_mask(values, values > 1, rule=rule, return_threshold=True)
        # The second of three processes; the key of 2.0.
        key = torch.tensor(-(2**62) if dtype == torch.float64 else 3 * 2**30, device="cuda")
        k, ties = torch.tensor(9, device="cuda"), torch.tensor([5, 70, 3], device="cuda")
        values = torch.full((70,), 2.0, device="cuda", dtype=dtype)
        torch.ops.entropy_rl.global_top_mask_at_key(values, values > 1, key, k, ties, 1)
        losses(dtype)
    # More rows than one block sorts by group id.
    entropy = torch.rand(9000, 2, device="cuda")
    group_ids = torch.arange(9000, device="cuda") % 3
    ext.global_top_mask(entropy, entropy > 0.1, scope="group", group_ids=group_ids)
    torch.cuda.synchronize()
    print("sanitize: every kernel ran")


if __name__ == "__main__":
    main()
