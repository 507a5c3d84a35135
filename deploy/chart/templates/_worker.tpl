{{- /* The pod of one worker: .root, .key and .worker (its values). .follows: it computes for its group's leader. */}}
{{- define "evenhand.workerPod" -}}
{{- $worker := .worker }}
metadata:
  labels: {{- include "evenhand.selector" (dict "root" .root "component" "worker") | nindent 4 }}
    evenhand/workers: {{ .key }}
    evenhand/role: {{ $worker.role }}
spec:
  automountServiceAccountToken: false
  securityContext: {{- include "evenhand.podSecurity" .root | nindent 4 }}
  # On SIGTERM a worker says that it wants nothing new, finishes what it has, and stops its engine.
  terminationGracePeriodSeconds: {{ add 45 $worker.shutdownSeconds }}
  {{- with .root.Values.imagePullSecrets }}
  imagePullSecrets: {{- toYaml . | nindent 4 }}
  {{- end }}
  containers:
    - name: worker
      image: {{ include "evenhand.image" (dict "root" .root "image" $worker.image) }}
      imagePullPolicy: {{ $worker.image.pullPolicy }}
      {{- if .follows }}
      {{- include "evenhand.followerCommand" . | nindent 6 }}
      {{- else }}
      {{- include "evenhand.workerCommand" . | nindent 6 }}
      ports:
        - {name: engine, containerPort: 8100}
        - {name: kv, containerPort: 8101}
      {{- end }}
      env:
        {{- include "evenhand.workerEnv" . | nindent 8 }}
      {{- if not .follows }}
      # The worker itself replaces an engine that dies, or that has requests and makes no step: no liveness probe is needed.
      startupProbe:
        httpGet: {path: /health, port: engine}
        periodSeconds: 5
        failureThreshold: {{ mul 12 $worker.startMinutes }}
      readinessProbe:
        httpGet: {path: /health, port: engine}
        periodSeconds: 5
        timeoutSeconds: 3
      {{- end }}
      resources: {{- toYaml $worker.resources | nindent 8 }}
      securityContext:
        allowPrivilegeEscalation: false
        capabilities: {drop: [ALL]{{ with $worker.capabilities }}, add: {{ toJson . }}{{ end }}}
      volumeMounts:
        - {name: models, mountPath: /models}
        - {name: shm, mountPath: /dev/shm}
  volumes:
    - name: shm
      emptyDir: {medium: Memory, sizeLimit: {{ $worker.sharedMemory }}}
    {{- if $worker.storage.existingClaim }}
    - name: models
      persistentVolumeClaim: {claimName: {{ $worker.storage.existingClaim }}}
    {{- else if not $worker.storage.size }}
    - name: models
      emptyDir: {}
    {{- end }}
  {{- with $worker.runtimeClassName }}
  runtimeClassName: {{ . }}
  {{- end }}
  {{- with $worker.affinity }}
  affinity: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $worker.nodeSelector }}
  nodeSelector: {{- toYaml . | nindent 4 }}
  {{- end }}
  {{- with $worker.tolerations }}
  tolerations: {{- toYaml . | nindent 4 }}
  {{- end }}
{{- end }}

{{- /* `evenhand worker` with its arguments; under Ray the cluster's head first. */}}
{{- define "evenhand.workerCommand" -}}
{{- if eq (include "evenhand.backend" .worker) "ray" -}}
command: [sh, -c]
{{- end }}
args:
  {{- if eq (include "evenhand.backend" .worker) "ray" }}
  - >-
    ray start --head --port=6379 --node-ip-address="$VLLM_HOST_IP" --disable-usage-stats
    && exec evenhand worker --address "$EVENHAND_ADDRESS" "$@"
  - evenhand-worker
  {{- end }}
  - --role
  - {{ .worker.role }}
  - --model
  - {{ .worker.model | quote }}
  {{- range concat (include "evenhand.groupArgs" . | fromYamlArray) .worker.engineArgs }}
  - {{ printf "--engine-arg=%s" . | quote }}
  {{- end }}
{{- end }}

{{- /* What computes for the leader of its group: vLLM without a server, or a node of the leader's Ray cluster. */}}
{{- define "evenhand.followerCommand" -}}
{{- if eq (include "evenhand.backend" .worker) "ray" -}}
command: [sh, -c]
args:
  - >-
    until ray health-check --address "$LWS_LEADER_ADDRESS:6379"; do sleep 2; done;
    exec ray start --block --address="$LWS_LEADER_ADDRESS:6379" --node-ip-address="$VLLM_HOST_IP" --disable-usage-stats
{{- else -}}
command: [vllm, serve]
args:
  - {{ .worker.model | quote }}
  - --headless
  {{- range concat (include "evenhand.groupArgs" . | fromYamlArray) .worker.engineArgs }}
  - {{ . | quote }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* "" for an engine on one node, else how its nodes work together. */}}
{{- define "evenhand.backend" -}}
{{- if gt (int .multiNode.nodes) 1 }}{{ .multiNode.backend }}{{ end }}
{{- end }}

{{- /* How vLLM uses its GPUs: those of a node share layers, and the nodes come one after the other. */}}
{{- define "evenhand.groupArgs" -}}
{{- $gpus := dig "limits" "nvidia.com/gpu" 1 .worker.resources }}
{{- $backend := include "evenhand.backend" .worker }}
{{- if $backend }}
- --tensor-parallel-size={{ $gpus }}
- --pipeline-parallel-size={{ .worker.multiNode.nodes }}
- --distributed-executor-backend={{ $backend }}
{{- if eq $backend "mp" }}
- --nnodes={{ .worker.multiNode.nodes }}
- --node-rank=$(LWS_WORKER_INDEX)
- --master-addr=$(LWS_LEADER_ADDRESS)
{{- end }}
{{- else if and (gt (int $gpus) 1) (not (regexMatch "parallel.size" (join " " .worker.engineArgs))) }}
- --tensor-parallel-size={{ $gpus }}
{{- else }}
[]
{{- end }}
{{- end }}

{{- define "evenhand.workerEnv" -}}
{{- $worker := .worker -}}
{{- if include "evenhand.backend" $worker -}}
- name: VLLM_HOST_IP
  valueFrom:
    fieldRef: {fieldPath: status.podIP}
{{ end -}}
{{- if not .follows -}}
- name: EVENHAND_NAME
  valueFrom:
    fieldRef: {fieldPath: metadata.name}
- name: EVENHAND_ADDRESS
  valueFrom:
    fieldRef: {fieldPath: status.podIP}
- {name: EVENHAND_ENGINE_PORT, value: "8100"}
- {name: EVENHAND_SHUTDOWN_S, value: "{{ $worker.shutdownSeconds }}"}
- {name: EVENHAND_START_TIMEOUT_S, value: "{{ mul 60 $worker.startMinutes }}"}
- {name: EVENHAND_POLICY, value: {{ .root.Values.gateway.policy | quote }}}
{{ include "evenhand.redis" .root }}
{{ end -}}
- {name: HF_HOME, value: /models}
# What a first start compiles outlives the pod where the models do.
- {name: VLLM_CACHE_ROOT, value: /models/.cache/vllm}
- {name: TRITON_CACHE_DIR, value: /models/.cache/triton}
{{- with $worker.huggingFaceSecret }}
- name: HF_TOKEN
  valueFrom:
    secretKeyRef: {name: {{ . }}, key: token}
{{- end }}
{{- with $worker.env }}
{{ toYaml . }}
{{- end }}
{{- end }}
