"""EnsembleSynthesizer: the policy acts and the forward models answer, step by step, as in MBPO (arXiv 1906.08253).

The comparison to make with imagined futures that come from a diffusion world model: nothing is drawn before the action
is known, and no action is inferred.

Symbols: B starts, H horizon, O observation size, A action size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from dawm.synthesis.rollouts import Drawn, Synthesizer
from dawm.synthesis.starts import Start

__all__ = ["EnsembleSynthesizer"]


@dataclass(frozen=True)
class EnsembleSynthesizer(Synthesizer):
    """A `Synthesizer` whose steps are the forward models' answers to the policy's noisy actions.

    The policy is that of ``starts``, which chooses the first action, too. At every step one member, drawn for each
    rollout anew, says observation, reward and termination, as in MBPO; the members have no noise of their own. The
    denoiser, the inverse dynamics, the return to aim at, ``guidance`` and ``labels`` play no part.
    """

    def _draw(self, generator: torch.Generator | None, start: Start, x: Tensor | None) -> Drawn:
        """One chunk."""
        observations, actions, _ = start
        forward_model, policy = self.world_model.forward_model, self.starts.policy
        if forward_model is None or policy is None:
            raise ValueError("an ensemble's rollouts need forward models and a policy")
        path, chosen, steps = [observations], [actions], []
        device, members = observations.device, len(forward_model.network.weights)
        for step in range(self.world_model.horizon):
            if step:
                noise = torch.randn(actions.shape, generator=generator, device=device)
                chosen.append((policy(path[-1]).to(device) + self.starts.noise * noise).clamp(-1, 1))
            asked = torch.randint(members, (len(path[-1]),), generator=generator, device=device)
            steps.append(forward_model.predict(self.world_model.codec, path[-1], chosen[-1], asked))
            path.append(steps[-1].next_observations)
        after, rewards, ends, disagreement = (torch.stack(part, dim=1) for part in zip(*steps))
        nothing = torch.zeros_like(rewards)
        return Drawn(torch.stack(path, 1), torch.stack(chosen, 1), after, rewards, ends, ends, nothing, nothing,
                     disagreement)  # fmt: skip
