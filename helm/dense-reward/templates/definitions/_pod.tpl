{{/* Parts that all pods of the chart share. */}}

{{- define "dense-reward.podSecurity" -}}
runAsNonRoot: true
{{- with .Values.securityContext.runAsUser }}
runAsUser: {{ int64 . }}
runAsGroup: {{ int64 . }}
{{- end }}
{{- with .Values.securityContext.fsGroup }}
fsGroup: {{ int64 . }}
fsGroupChangePolicy: OnRootMismatch
{{- end }}
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "dense-reward.containerSecurity" -}}
allowPrivilegeEscalation: false
capabilities:
  drop: [ALL]
privileged: false
readOnlyRootFilesystem: true
runAsNonRoot: true
{{- end -}}

{{/* Without enableServiceLinks: false Kubernetes sets DENSE_REWARD_SERVICE_HOST and others, which the service refuses. */}}
{{- define "dense-reward.podCommon" -}}
automountServiceAccountToken: false
enableServiceLinks: false
serviceAccountName: {{ include "dense-reward.serviceAccountName" . | quote }}
securityContext:
  {{- include "dense-reward.podSecurity" . | nindent 2 }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . | quote }}
  {{- end }}
{{- end }}
{{- end -}}

{{- define "dense-reward.placement" -}}
{{- with .Values.priorityClassName }}
priorityClassName: {{ . | quote }}
{{- end }}
{{- with .Values.runtimeClassName }}
runtimeClassName: {{ . | quote }}
{{- end }}
{{- with .Values.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- $affinity := deepCopy .Values.affinity }}
{{- with .Values.nodeSelectorTerms }}
{{- $required := dict "nodeSelectorTerms" . }}
{{- $_ := set $affinity "nodeAffinity" (dict "requiredDuringSchedulingIgnoredDuringExecution" $required) }}
{{- end }}
{{- with $affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{/* Arguments: gpu, gpuType, cpu, memory, disk, limitCPU, limitMemory. */}}
{{- define "dense-reward.resources" -}}
requests:
  cpu: {{ .cpu | quote }}
  memory: {{ .memory | quote }}
  {{- with .disk }}
  ephemeral-storage: {{ . | quote }}
  {{- end }}
  {{- if .gpu }}
  {{ .gpuType }}: {{ int .gpu }}
  {{- end }}
limits:
  memory: {{ default .memory .limitMemory | quote }}
  {{- with .limitCPU }}
  cpu: {{ . | quote }}
  {{- end }}
  {{- if .gpu }}
  {{ .gpuType }}: {{ int .gpu }}
  {{- end }}
{{- end -}}

{{/* Libraries need a home folder and a user name: the root is read-only, and the user can be missing in /etc/passwd. */}}
{{- define "dense-reward.homeEnv" -}}
- name: HOME
  value: /tmp
- name: USER
  value: dense-reward
{{- end -}}

{{- define "dense-reward.givenEnv" -}}
{{- with .Values.env -}}
{{- toYaml . -}}
{{- end -}}
{{- end -}}

{{- define "dense-reward.tmpVolume" -}}
- name: tmp
  emptyDir:
    sizeLimit: {{ .Values.tmpSize | quote }}
{{- end -}}
