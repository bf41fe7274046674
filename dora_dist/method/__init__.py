"""The method of Mao et al. (2024) as pure functions of tensors: torch only."""
