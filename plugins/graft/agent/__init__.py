"""The agent of graft: what it sees, how it scores teachers, how it acts and learns."""

from medrl.plugins.graft.agent.episode import (
    StoredEpisode,
    TraceEpisode,
    published_losses,
    published_step_loss,
)
from medrl.plugins.graft.agent.policy import FreePolicy, TeacherEncoder, TeacherPolicy
from medrl.plugins.graft.agent.state import (
    POOLED,
    PolicyState,
    make_state,
    state_channels,
    state_scalars,
)
from medrl.plugins.graft.agent.teacher_agent import (
    Action,
    AgentSettings,
    Agreement,
    Correlation,
    ScoredAction,
    TeacherAgent,
    UpdateReport,
)

__all__ = [
    "POOLED",
    "Action",
    "AgentSettings",
    "Agreement",
    "Correlation",
    "FreePolicy",
    "PolicyState",
    "ScoredAction",
    "StoredEpisode",
    "TeacherAgent",
    "TeacherEncoder",
    "TeacherPolicy",
    "TraceEpisode",
    "UpdateReport",
    "make_state",
    "published_losses",
    "published_step_loss",
    "state_channels",
    "state_scalars",
]
