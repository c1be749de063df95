"""The whole path in Python, with plain Lightning Trainers: world model, inverse dynamics, agent.

python examples/three_stages.py
"""

import lightning as L

from dawm.agents import TD3BC
from dawm.callbacks import EvaluateInEnvironment, RegenerateRollouts
from dawm.data.module import TransitionDataModule
from dawm.inverse_dynamics import InverseDynamics
from dawm.world_model import DiffusionWorldModel

data = TransitionDataModule("embedded/hopper/medium-replay", synthetic_fraction=0.5)
sizes = data.observation_size, data.action_size
world_model, inverse_dynamics, agent = DiffusionWorldModel(*sizes), InverseDynamics(*sizes), TD3BC(*sizes)
L.Trainer(max_steps=2000).fit(world_model, datamodule=data)  # imagines observations and rewards
L.Trainer(max_steps=1500).fit(inverse_dynamics, datamodule=data)  # infers the actions between them
rollouts = RegenerateRollouts(every_n_steps=1000)  # refills the synthetic half of the agent's batches
rollouts.connect(world_model, inverse_dynamics)
scores = EvaluateInEnvironment(every_n_steps=500, episodes=10)
L.Trainer(max_steps=2000, callbacks=[rollouts, scores]).fit(agent, datamodule=data)
print("scores while it learnt:", [round(entry["score"], 1) for entry in scores.history])
