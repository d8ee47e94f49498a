"""Small model shapes for tests that need no weights."""

from alisa.spec import ModelSpec, Rope


def small_spec(num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8):
    return ModelSpec(
        family="llama",
        num_layers=num_layers,
        hidden_size=num_heads * head_dim,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        ffn_size=64,
        vocab_size=100,
        max_positions=512,
        norm="rmsnorm",
        norm_eps=1e-5,
        activation="silu",
        gated_mlp=True,
        rope=Rope(10000.0, head_dim),
    )
