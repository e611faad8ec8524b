# A model behind OpenAI's API, and behind Vertex AI's contract for containers, on a CPU:
#
#   docker build -t gemma-multi .
#   docker run -p 127.0.0.1:8000:8000 -e GEMMA_MULTI_API_KEY=... -v ./model.litertlm:/model.litertlm \
#       gemma-multi model=/model.litertlm
#
# Without arguments it serves the bundled storyteller.
FROM python:3.12-slim AS build
WORKDIR /source
COPY . .
RUN python -m venv /venv && /venv/bin/pip install --no-cache-dir '.[litert,serve]'

FROM python:3.12-slim
COPY --from=build /venv /venv
# not root; its home holds what is exported and packed once
RUN useradd --create-home --uid 10001 gemma
USER gemma
WORKDIR /home/gemma
ENV PATH=/venv/bin:$PATH PYTHONUNBUFFERED=1
# Vertex AI sets its own port; 0.0.0.0 is this container's inside, and needs GEMMA_MULTI_API_KEY
EXPOSE 8000
HEALTHCHECK --interval=30s --timeout=5s --start-period=120s \
    CMD python -c "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ.get('AIP_HTTP_PORT', '8000') + os.environ.get('AIP_HEALTH_ROUTE', '/health'), timeout=4)"
# SIGTERM lets what runs finish
STOPSIGNAL SIGTERM
ENTRYPOINT ["gemma-multi", "serve", "--host", "0.0.0.0"]
CMD ["storyteller"]
