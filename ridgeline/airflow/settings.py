"""Settings inside of Airflow, where connections can be looked up."""

from __future__ import annotations

from ridgeline.connections import Connection, hide_secrets
from ridgeline.masking import known
from ridgeline.settings import Settings


class AirflowSettings(Settings):
    """`Settings` for the processes of Airflow: tasks, callbacks, the triggerer and the web server."""

    def look_up(self, conn_id: str) -> Connection:
        """Return a connection from Airflow's secrets backends, environment or database; its secrets become hidden.

        Args:
            conn_id: Its id.

        Raises:
            ValueError: If there is none, or it can't be looked up.
        """
        # Imported here: Airflow reads its folder from the environment when it is imported.
        from airflow.sdk import Connection as AirflowConnection
        from airflow.sdk.exceptions import AirflowNotFoundException
        from airflow.sdk.log import mask_secret

        try:
            found: Connection = AirflowConnection.get(conn_id)
        except AirflowNotFoundException:  # also where a secrets backend raised an error
            raise ValueError("Airflow has no such connection, or its secrets backend does not respond") from None
        except Exception as error:  # whatever the code of a secrets backend raises
            raise ValueError(f"Airflow can't look it up ({type(error).__name__})") from None
        hide_secrets(found)
        for secret in known():
            mask_secret(secret)
        return found
