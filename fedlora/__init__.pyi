from fedlora.config.config import AdapterConfig as AdapterConfig
from fedlora.config.config import DataConfig as DataConfig
from fedlora.config.config import EngineConfig as EngineConfig
from fedlora.config.config import FederationConfig as FederationConfig
from fedlora.config.config import HomeConfig as HomeConfig
from fedlora.config.config import ModelConfig as ModelConfig
from fedlora.config.config import PrivacyConfig as PrivacyConfig
from fedlora.config.config import RunConfig as RunConfig
from fedlora.config.config import TrackingConfig as TrackingConfig
from fedlora.config.config import TrainingConfig as TrainingConfig
from fedlora.config.config import load as load
from fedlora.errors import InputError as InputError
from fedlora.models.adapters import AdapterState as AdapterState
from server.roster import RunFailed as RunFailed
from simulation.federate import run as run
from simulation.result import Result as Result
from strategies.base import Round as Round
from strategies.base import Strategy as Strategy
from strategies.collected import Collected as Collected

__version__: str
ROOMS: tuple[str, ...]
