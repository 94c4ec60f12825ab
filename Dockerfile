# The service; for a database and settings see docker-compose.yml. Built in two stages, so that nothing which only
# installs (pip, its caches, a compiler if a wheel is missing) is in the image that runs.
FROM python:3.13-slim AS build
COPY requirements.txt .
RUN python -m venv --without-pip /venv \
    && pip --python /venv/bin/python install --no-cache-dir -r requirements.txt

FROM python:3.13-slim
LABEL org.opencontainers.image.title="awschat" \
      org.opencontainers.image.description="A chat backend that answers questions about AWS and nothing else" \
      org.opencontainers.image.licenses="MIT" \
      org.opencontainers.image.version="2.0.0"
# HOST: inside a container all interfaces are the container's own; what is published is the operator's choice.
ENV PATH=/venv/bin:$PATH PYTHONDONTWRITEBYTECODE=1 PYTHONUNBUFFERED=1 HOST=0.0.0.0 PORT=8000
RUN pip uninstall --yes --root-user-action=ignore pip
COPY --from=build /venv /venv
WORKDIR /app
# demo.py starts no database here, because the image has none: it only adds the demo model where no model is set.
COPY awschat.py demo.py fake_openai.py schema.sql system_prompt.txt judge_prompt.txt aws_terms.txt ./
COPY web ./web
# A number, so that an orchestrator can see that it is not root. The service writes no file.
USER 10001:10001
EXPOSE 8000
STOPSIGNAL SIGTERM
# /ready, not /health: a service without its database is not healthy for whoever waits for it. An orchestrator that
# restarts what is unhealthy should ask /health instead, because a restart mends no database.
HEALTHCHECK --interval=10s --timeout=15s --start-period=30s --start-interval=1s \
    CMD ["python", "-c", "import os, urllib.request as http; http.urlopen(f'http://127.0.0.1:{os.environ[\"PORT\"]}/ready', timeout=14)"]
# No shell in between: the service is process 1 and gets the stop signal itself.
CMD ["python", "demo.py"]
