"""The weights: the policy, the ZeRO engine around it, its checkpoints and its export."""
