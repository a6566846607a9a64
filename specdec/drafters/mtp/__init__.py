"""Multi-token prediction: the layers behind a target's own that its checkpoint has and transformers drops.

Source: Gloeckle et al. 2024; DeepSeek-AI 2024 (DeepSeek-V3), section 2.2."""
